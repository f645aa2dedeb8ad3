"""A teacher's signal on disk, keyed by content: what it was asked of, not when it was asked."""

from sadkern.store.directory import Store, Writer
from sadkern.store.identity import Identity, IdentityError, tokenizer_identity
from sadkern.store.shard import DamagedError, content_key

__all__ = [
    "DamagedError",
    "Identity",
    "IdentityError",
    "Store",
    "Writer",
    "content_key",
    "tokenizer_identity",
]
