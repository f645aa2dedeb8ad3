"""The paper's Table 3, Table 5, Figure 2 and curriculum at small scale, in ALFWorld's own engine:
`python -m bench.reproduce --output runs/reproduce`.

A scripted agent that sees text alone (`explorer`) plays games of our own; a small teacher learns
its episodes; students of three sizes, which know no more than an aimless agent's episodes
(`wanderer`), are taught by it in each of the paper's ways, and play games that nothing was trained
on. `study` has the settings, `material` makes what is learnt from, `students` teaches, `report`
writes it up.
"""
