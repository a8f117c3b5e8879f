"""Reads a listing of packed VLIW bundles, as the TPU compiler dumps it after register allocation, into operations.

One line of a listing is one bundle, which is one cycle of a core that does not stall; empty bundles stand for latency. Only what decides
where control goes and which DMAs are started is kept: scalar and predicate operations, DMAs, semaphores and branches. Vector and matrix
operations matter by the bundles they fill alone. What operations do is in `scalar`, running them in `machine`.
"""

import re
from dataclasses import dataclass, field

HEAD = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{", re.M)
COMMENT_EDGE = re.compile(r"/\*|\*/")
OPERATION = re.compile(r"(?:(%\w+) = )?([a-z_][\w.\-]*)(.*)", re.S)
ATTRIBUTE = re.compile(r"\[(?:thread|resolvable):[^\]]*\]")
OPERAND = re.compile(r"(?:(\w+)=)?(\[[^,]*\]|[^\s,=]+)((?:\s+[A-Za-z][\w-]*)*)")
BRANCH_TARGET = re.compile(r"target bundleno = (\d+)")
PREDICATE = re.compile(r"\((!?)(%\w+)(?:, (%\w+))?\),?")

# Comments that say what a mnemonic leaves open; they become words of the operation.
MEANINGFUL = {"kRem": "kRem", "kDiv": "kDiv", "core id": "core_id"}
WORDS = frozenset(MEANINGFUL.values())


@dataclass(frozen=True)
class Operation:
    """One scalar, DMA, semaphore or branch operation.

    Under a predicate that is false nothing happens, and the result is the value named by `otherwise`, if there is one.
    """

    name: str  # the mnemonic: "sadd.s32"
    result: str | None  # "%s21_s19"
    operands: tuple[str, ...]  # values ("%s946_s17"), integers, addresses ("[#allocation2 + $0x8]")
    named: dict[str, str] = field(default_factory=dict)  # operands that the listing labels, by their label
    predicate: str | None = None
    negated: bool = False
    otherwise: str | None = None
    words: frozenset[str] = frozenset()  # "kRem", "core_id", "hbm-to-hbm"

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all values that it may read."""
        texts = [*self.operands, *self.named.values(), self.predicate or "", self.otherwise or ""]
        return tuple(name for text in texts for name in re.findall(r"%\w+", text))


@dataclass(frozen=True)
class Listing:
    """The bundles of one kernel in order, and the address at which each stands."""

    bundles: tuple[tuple[Operation, ...], ...]
    index: dict[int, int]  # address -> place in `bundles`


def parse_listing(text: str) -> Listing:
    """The listing in `text`; ValueError if it holds no bundle."""
    text = _without_comments(text)
    heads = list(HEAD.finditer(text))
    if not heads:
        raise ValueError("the text holds no packed bundles")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bundles = tuple(_bundle(text[head.end() : end].rpartition("}")[0]) for head, end in zip(heads, ends, strict=True))
    return Listing(bundles, {int(head[1], 16): place for place, head in enumerate(heads)})


def _without_comments(text: str) -> str:
    """Drops comments, which nest; labels of operands become `label=`, and those in MEANINGFUL words."""
    kept: list[str] = []
    depth = start = position = 0
    for edge in COMMENT_EDGE.finditer(text):
        if edge[0] == "/*":
            if depth == 0:
                kept.append(text[position : edge.start()])
                start = edge.end()
            depth += 1
        elif depth:
            depth -= 1
            position = edge.end()
            if depth == 0:
                kept.append(_kept_of(text[start : edge.start()]))
    kept.append(text[position:])
    return "".join(kept)


def _kept_of(comment: str) -> str:
    if re.fullmatch(r"\w+=", comment):
        return comment
    said = comment.strip()
    if re.fullmatch(r"\w+-to-\w+", said):
        return f" {said} "
    said = said.rpartition(":: ")[2]  # libtpu 0.0.50: "megacore core id :: core id"
    return f" {MEANINGFUL[said]} " if said in MEANINGFUL else ""


def _bundle(body: str) -> tuple[Operation, ...]:
    """The operations of one bundle: phis first, and whatever names a value of the same bundle after that value.

    A bundle's operations run at once, so only phis and pseudo-operations, such as the naming of a pointer, can depend on each other.
    """
    operations = [found for part in body.split(";;") if (found := _operation(part.strip()))]
    ordered = [operation for operation in operations if operation.name == "sphi"]
    waiting = [operation for operation in operations if operation.name != "sphi"]
    while waiting:
        pending = {operation.result for operation in waiting}
        ready = [operation for operation in waiting if pending.isdisjoint(operation.reads)] or waiting
        ordered += ready
        waiting = [operation for operation in waiting if operation not in ready]
    return tuple(ordered)


def _operation(text: str) -> Operation | None:
    match = OPERATION.fullmatch(text)
    if not match:
        return None
    result, name, rest = match.groups()
    scalar = result is not None and re.match(r"%[sp]\d", result) is not None
    if not scalar and not name.startswith(("s", "dma.", "vsync", "vwait")):
        return None
    rest = ATTRIBUTE.sub("", rest)
    predicate = PREDICATE.search(rest)
    if predicate:
        rest = rest[: predicate.start()] + rest[predicate.end() :]
    operands: list[str] = []
    named: dict[str, str] = {}
    words: set[str] = set()
    if name == "sbr.rel":
        target = BRANCH_TARGET.search(rest)
        named = {"target": target[1]} if target else {}
        rest = ""
    for label, operand, said in OPERAND.findall(rest):
        if operand in WORDS or "-to-" in operand:
            words.add(operand)
        elif label:
            named[label] = operand
        else:
            operands.append(operand)
        words.update(said.split())
    return Operation(
        name,
        result,
        tuple(operands),
        named,
        predicate=predicate[2] if predicate else None,
        negated=bool(predicate and predicate[1]),
        otherwise=predicate[3] if predicate else None,
        words=frozenset(words),
    )
