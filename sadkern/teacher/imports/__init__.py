"""Captures of other tools, brought into a store: they serve then as a teacher that was asked.

>>> from sadkern.teacher.imports import Axolotl
>>> row = {"input_ids": [5, 7, 6], "target_token_ids": [[7], [6], [0]],
...        "target_logprobs": [[-0.5], [-0.25], [0.0]], "target_mask": [[1], [1], [0]]}
>>> Axolotl().read(row).positions.tolist()
[0, 1, 2]
"""

from sadkern.teacher.imports.axolotl import Axolotl
from sadkern.teacher.imports.distillkit import DistillKit, find_config, load_config
from sadkern.teacher.imports.importing import Importer, import_files
from sadkern.teacher.imports.table import Rows, read_table

__all__ = [
    "Axolotl",
    "DistillKit",
    "Importer",
    "Rows",
    "find_config",
    "import_files",
    "load_config",
    "read_table",
]
