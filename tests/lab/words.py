"""What a person makes of the lab's tables, by the letter of the comparison; the page takes it over."""

FOUND: dict[str, str] = {}
