"""SLURM's short forms: `n[1-3,7]` for nodes, `2(x3),1` for tasks."""

import re

_REPEATED = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")


def expand_hosts(text: str) -> tuple[str, ...]:
    """Return the names of a node list, in its order.

    `r[1-2]n[01-03],login` gives r1n01 r1n02 r1n03 r2n01 r2n02 r2n03 login. Needs no scontrol, which
    a container rarely has. Raises ValueError if the text is not a node list.
    """
    names: list[str] = []
    for word in _split(text):
        names += _expand_word(word)
    return tuple(names)


def expand_counts(text: str) -> tuple[int, ...]:
    """Return one number a node: `2(x3),1` gives 2 2 2 1. Raises ValueError if it is not that."""
    counts: list[int] = []
    for word in text.split(","):
        found = _REPEATED.match(word.strip())
        if found is None:
            raise ValueError(f"'{text}' is not a list of task counts such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    words, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            words.append(text[begin:place])
            begin = place + 1
    words.append(text[begin:])
    if depth or not all(word.strip() for word in words):
        raise ValueError(f"'{text}' is not a list of nodes such as n[1-3,7]")
    return [word.strip() for word in words]


def _expand_word(word: str) -> list[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    inside, _, tail = rest.partition("]")
    numbers: list[str] = []
    for item in inside.split(","):
        first, _, last = item.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"'{word}' is not a list of nodes such as n[1-3,7]")
        numbers += [
            str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)
        ]
    return [head + number + end for number in numbers for end in _expand_word(tail)]
