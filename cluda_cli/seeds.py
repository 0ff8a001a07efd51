"""Every random draw comes from a seed named by (run seed, purpose, step), so that a resumed run repeats it exactly."""

import hashlib


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Seed in [0, 2^63) for one purpose at one step; other purposes and steps get unrelated seeds.

    Stable across processes and versions of Python: BLAKE2b of the decimal text, not `hash`.
    """
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
