"""Pages are neither lost nor shared wrongly; each request gets the tokens that it gets alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
import pytest

from grit_jax.inference.page_pool import PagePool
from grit_jax.inference.scheduler import Scheduler, TokenSequence

PAGE, NUM_PAGES, STEPS = 4, 12, 3


def next_token(text):
    """A made-up model: the next token depends on all tokens before it."""
    return hash(text) % 3


class PagedModel:
    """Keeps in each slot the whole text up to its token, and checks what it reads."""

    def __init__(self, scheduler):
        self.scheduler, self.slots = scheduler, {}

    def step(self):
        scheduler = self.scheduler
        while (sequence := scheduler.start()) is not None:
            if (count := sequence.num_cached - sequence.num_read) > 0:
                self.write(sequence, [-1] * count)
                scheduler.advance(sequence, count)
        sequences, length = scheduler.sequences_to_read()
        for sequence in sequences:
            chunk = sequence.next_tokens(length)
            is_whole = len(chunk) == sequence.num_pending
            text = self.write(sequence, chunk)
            scheduler.advance(sequence, len(chunk), [next_token(text)] if is_whole else [])
        sequences, steps = scheduler.sequences_to_decode(STEPS)
        for sequence in sequences:
            tokens = [sequence.tokens[-1]]
            for _ in range(min(steps, sequence.num_remaining)):
                tokens.append(next_token(self.write(sequence, tokens)))
            scheduler.advance(sequence, len(tokens) - 1, tokens[1:])

    def write(self, sequence, tokens):
        text = ()
        for position in range(sequence.num_read + len(tokens)):
            slot = sequence.pages[position // PAGE], position % PAGE
            if position >= sequence.num_read:
                self.slots[slot] = (*text, tokens[position - sequence.num_read])
            assert self.slots[slot][:-1] == text, "the page of another text"
            text = self.slots[slot]
        return text


def check_pages(scheduler):
    users = Counter(page for sequence in scheduler.running for page in sequence.pages)
    pool = scheduler.pool
    assert [pool.num_users(page) for page in range(NUM_PAGES)] == [
        users[page] for page in range(NUM_PAGES)
    ]
    assert pool.num_used == len(users)
    assert not any(sequence.pages for sequence in scheduler.waiting)


# A prompt is a few first tokens of a text that all prompts share, and an own end.
requests = st.tuples(
    st.sampled_from([0, 3, 4, 9]), st.integers(0, 10), st.lists(st.integers(0, 2), min_size=1,
    max_size=12), st.integers(1, 14)
)  # fmt: skip
actions = st.lists(st.one_of(requests, st.just("step"), st.integers(0, 9)), max_size=40)


@given(actions, st.integers(1, 4))
def test_random_requests_get_the_tokens_that_they_get_alone(actions, max_running):
    scheduler = Scheduler(PagePool(NUM_PAGES), PAGE, max_running)
    model, active, number = PagedModel(scheduler), [], 0

    def step():
        model.step()
        check_pages(scheduler)
        for sequence, prompt in [*active]:
            if sequence.num_remaining == 0:
                scheduler.remove(sequence)
                active.remove((sequence, prompt))
                text = (-1,) * sequence.num_cached + tuple(prompt)
                for token in sequence.tokens[len(prompt) :]:
                    assert token == next_token(text)
                    text += (token,)
                assert sequence.num_new == sequence.max_new_tokens

    for action in actions:
        if action == "step":
            step()
        elif isinstance(action, int):  # Cancels a request.
            if action < len(active):
                scheduler.remove(active.pop(action)[0])
        else:
            num_cached, num_common, own, max_new_tokens = action
            prompt = [0, 1, 2, 0, 1, 1, 0, 2, 2, 1][:num_common] + own
            cached = [b"cached"] * -(-num_cached // PAGE)
            sequence = TokenSequence(number, list(prompt), max_new_tokens, cached, num_cached)
            if scheduler.pages_for(sequence.length + max_new_tokens) <= NUM_PAGES:
                scheduler.add(sequence)
                active.append((sequence, prompt))
                number += 1
    for _ in range(500):
        if not active:
            break
        step()
    assert not active and scheduler.pool.num_used == 0


def test_the_youngest_is_preempted_and_read_again():
    scheduler = Scheduler(PagePool(6), PAGE, 2)
    model = PagedModel(scheduler)
    old, young = (TokenSequence(number, [number] * 4, 12) for number in range(2))
    scheduler.add(young)
    scheduler.add(old)
    while not scheduler.num_preempted:
        model.step()
    assert scheduler.running == [old] and scheduler.waiting == [young]
    num_new = young.num_new
    scheduler.remove(old)
    model.step()
    assert young.num_read >= 4 + num_new and young.num_new > num_new


def test_two_requests_read_a_prompt_once():
    scheduler = Scheduler(PagePool(1000), PAGE, 2)
    model = PagedModel(scheduler)
    twins = [TokenSequence(number, [0] * 1500, 1) for number in range(2)]
    for twin in twins:
        scheduler.add(twin)
    num_calls = 0
    while twins[0].num_remaining or twins[1].num_remaining:
        model.step()
        num_calls += 1
        check_pages(scheduler)
    assert num_calls == 4  # Three chunks, and the last tokens of the other one.
    assert twins[0].pages[:374] == twins[1].pages[:374]


def test_long_and_short_prompts_are_read_in_turns():
    scheduler = Scheduler(PagePool(1000), PAGE, 8)
    model = PagedModel(scheduler)
    long, short = TokenSequence(0, [0] * 2000, 4), TokenSequence(1, [1] * 20, 4)
    scheduler.add(long)
    model.step()
    assert long.num_read == 512
    scheduler.add(short)
    for _ in range(3):
        model.step()
    assert short.num_new and not long.num_new
    with pytest.raises(ValueError, match="page 999 has no user"):
        scheduler.pool.release([999])
