"""Examples dealt to batches so that every batch has nearly the same number of tokens.

Legend of dimensions: N examples, K kinds of length (of an example's query and of its passages).
"""

from jaxtyping import Float, Int
import numpy as np


def balance_batches(
    batches: Int[np.ndarray, " N"], groups: Int[np.ndarray, " N"], lengths: Int[np.ndarray, "N K"]
) -> Int[np.ndarray, " N"]:
    """Returns a batch for each example, such that the sums of lengths of the batches are close.

    Examples change places within their group alone, so each batch keeps its number of examples of
    each group. They are dealt in rounds, longest first, one to each batch, and the longest of a
    round goes to the batch that has the least so far.

    Args:
      batches: the batch that each example's place belongs to, from 0.
      groups: number of each example's group.
      lengths: of each example.
    """
    # Each kind of length is counted in shares of its own total.
    shares = lengths / np.maximum(1, lengths.sum(axis=0, keepdims=True))
    sizes = shares.sum(axis=1)
    # What a batch will have if all that is to come is average; the rest are differences from it.
    loads = np.zeros((batches.max(initial=0) + 1, lengths.shape[1]))
    differences = np.empty_like(shares)
    rounds = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        mean = shares[members].mean(axis=0)
        np.add.at(loads, batches[members], mean)
        differences[members] = shares[members] - mean
        longest_first = members[np.argsort(-sizes[members], kind="stable")]
        places = _rounds(batches[members])
        ends = np.cumsum([len(each) for each in places])[:-1]
        rounds += zip(np.split(longest_first, ends), places, strict=True)
    # What is dealt later evens out what was dealt before, so the longest come first.
    rounds.sort(key=lambda each: -sizes[each[0][0]])
    dealt = np.empty_like(batches)
    for taken, places in rounds:
        dealt[taken] = _match(taken, places, differences, loads)
    return dealt


def _rounds(batches: Int[np.ndarray, " N"]) -> list[np.ndarray]:
    """Returns the batches in rounds; a batch is in as many rounds as it has places.

    One with few places is in rounds spread over all of them: it gets long and short examples.
    """
    numbers, counts = np.unique(batches, return_counts=True)
    most = int(counts.max())
    ranks = np.concatenate([np.arange(count) for count in counts])
    rounds = (2 * ranks + 1) * most // (2 * np.repeat(counts, counts))
    order = np.argsort(rounds, kind="stable")
    starts = np.searchsorted(rounds[order], np.arange(1, most))
    return np.split(np.repeat(numbers, counts)[order], starts)


def _match(
    taken: Int[np.ndarray, " M"],
    places: Int[np.ndarray, " M"],
    differences: Float[np.ndarray, "N K"],
    loads: Float[np.ndarray, "B K"],
) -> Int[np.ndarray, " M"]:
    """Returns a batch of `places` for each example of `taken`, and adds it to the loads."""
    own_loads = loads[places]
    kind = np.argmax(np.ptp(own_loads, axis=0))
    by_load = places[np.argsort(own_loads[:, kind], kind="stable")]
    by_length = np.argsort(-differences[taken, kind], kind="stable")
    matched = np.empty_like(places)
    matched[by_length] = by_load
    loads[matched] += differences[taken]
    return matched
