"""How many positions' logits exist at once: vocabularies are large (126k and more)."""

LOGIT_BYTES = 2**28  # of fp32 logits at once; generation cuts a seed's noise by it, so keep it


def logit_slices(count: int, vocabulary: int, kinds: int = 1) -> list[slice]:
    """Cut `count` positions so that `kinds` fp32 logits of each slice stay within LOGIT_BYTES (one at least)."""
    size = max(1, LOGIT_BYTES // (4 * vocabulary * kinds))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
