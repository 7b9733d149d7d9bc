"""The held-out split is a property of each document."""

from data.prepare.documents import Document, is_held_out


def test_share_follows_the_fraction_and_the_seed() -> None:
    documents = [Document("text", "name", split_key=f"key {n}") for n in range(4000)]
    held_out = [is_held_out(document, 0.05, seed=0) for document in documents]
    # 4000 draws of 5 %: 200 expected, standard deviation 14; five of them on either side.
    assert 130 < sum(held_out) < 270
    assert held_out == [is_held_out(document, 0.05, seed=0) for document in documents]
    assert held_out != [is_held_out(document, 0.05, seed=1) for document in documents]
    assert not any(is_held_out(document, 0.0, seed=0) for document in documents)


def test_larger_fraction_keeps_what_was_held_out() -> None:
    documents = [Document("text", "name", split_key=f"key {n}") for n in range(500)]
    small = [is_held_out(document, 0.1, seed=0) for document in documents]
    large = [is_held_out(document, 0.3, seed=0) for document in documents]
    assert all(large[n] for n in range(500) if small[n])
    assert sum(large) > sum(small) > 0


def test_only_the_split_key_counts() -> None:
    keys = [f"key {n}" for n in range(200)]
    one = [is_held_out(Document("a", "x", key), 0.5, 0) for key in keys]
    other = [is_held_out(Document("b", "y", key), 0.5, 0) for key in keys]
    assert one == other
