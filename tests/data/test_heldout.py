"""The held-out split is a property of each document."""

from data.prepare.heldout import heldout_share, is_held_out


def test_share_follows_the_fraction_and_the_seed() -> None:
    keys = [f"key {n}".encode() for n in range(4000)]
    held_out = [is_held_out(key, 0.05, seed=0) for key in keys]
    # 4000 draws of 5 %: 200 expected, standard deviation 14; five of them on either side.
    assert 130 < sum(held_out) < 270
    assert held_out == [is_held_out(key, 0.05, seed=0) for key in keys]
    assert held_out != [is_held_out(key, 0.05, seed=1) for key in keys]
    assert not any(is_held_out(key, 0.0, seed=0) for key in keys)


def test_larger_fraction_keeps_what_was_held_out() -> None:
    keys = [f"key {n}".encode() for n in range(500)]
    small = [is_held_out(key, 0.1, seed=0) for key in keys]
    large = [is_held_out(key, 0.3, seed=0) for key in keys]
    assert all(large[n] for n in range(500) if small[n])
    assert sum(large) > sum(small) > 0


def test_no_more_tokens_than_asked_for() -> None:
    assert heldout_share(0.01, 10_000_000, 4 * 10**12) == 1e-5
    assert heldout_share(0.01, 10_000_000, 10**6) == 0.01  # a small corpus: the share decides
    assert heldout_share(0.0, 10_000_000, 10**6) == heldout_share(0.01, 0, 10**6) == 0
