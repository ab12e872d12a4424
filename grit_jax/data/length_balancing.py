"""Assigns examples to batches so that all batches have nearly the same number of tokens.

Legend of dimensions: N examples, C streams (such as queries and passages), B batches, M examples of
a round.
"""

from jaxtyping import Float, Int
import numpy as np


def balance_batches(
    batches: Int[np.ndarray, " N"], groups: Int[np.ndarray, " N"], lengths: Int[np.ndarray, "N C"]
) -> Int[np.ndarray, " N"]:
    """Returns a batch for each example, such that the batches have similar numbers of tokens.

    Examples are exchanged within their group only, so each batch keeps its number of examples of
    each group. They are assigned in rounds, longest first, at most one per batch and round; the
    longest example of a round goes to the batch with the fewest tokens so far.

    Args:
      batches: the batch of each slot, from 0.
      groups: the group of each slot, and of the example that is in it now.
      lengths: tokens of each example in each stream.
    """
    # Each stream is measured as a share of its total, so that all streams count equally.
    shares = lengths / np.maximum(1, lengths.sum(axis=0, keepdims=True))
    sizes = shares.sum(axis=1)
    # A load starts as if all examples of the batch were average, and changes by the differences.
    loads = np.zeros((batches.max(initial=0) + 1, lengths.shape[1]))
    differences = np.empty_like(shares)
    rounds = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        mean = shares[members].mean(axis=0)
        np.add.at(loads, batches[members], mean)
        differences[members] = shares[members] - mean
        longest_first = members[np.argsort(-sizes[members], kind="stable")]
        slots = _rounds(batches[members])
        ends = np.cumsum([len(each) for each in slots])[:-1]
        rounds += zip(np.split(longest_first, ends), slots, strict=True)
    # Later rounds compensate for earlier ones, so the longest examples come first.
    rounds.sort(key=lambda each: -sizes[each[0][0]])
    balanced = np.empty_like(batches)
    for examples, slots in rounds:
        balanced[examples] = _match(examples, slots, differences, loads)
    return balanced


def _rounds(batches: Int[np.ndarray, " N"]) -> list[np.ndarray]:
    """Splits the slots of batches into rounds with at most one slot per batch.

    The slots of a batch are spread over all rounds, so a batch with few slots gets long and short
    examples.
    """
    indices, counts = np.unique(batches, return_counts=True)
    num_rounds = int(counts.max())
    ranks = np.concatenate([np.arange(count) for count in counts])
    rounds = (2 * ranks + 1) * num_rounds // (2 * np.repeat(counts, counts))
    order = np.argsort(rounds, kind="stable")
    starts = np.searchsorted(rounds[order], np.arange(1, num_rounds))
    return np.split(np.repeat(indices, counts)[order], starts)


def _match(
    examples: Int[np.ndarray, " M"],
    slots: Int[np.ndarray, " M"],
    differences: Float[np.ndarray, "N C"],
    loads: Float[np.ndarray, "B C"],
) -> Int[np.ndarray, " M"]:
    """Returns the batch of each example of a round, one per slot, and adds it to the loads."""
    own_loads = loads[slots]
    stream = np.argmax(np.ptp(own_loads, axis=0))
    by_load = slots[np.argsort(own_loads[:, stream], kind="stable")]
    by_length = np.argsort(-differences[examples, stream], kind="stable")
    matched = np.empty_like(slots)
    matched[by_length] = by_load
    loads[matched] += differences[examples]
    return matched
