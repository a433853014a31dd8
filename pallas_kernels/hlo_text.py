"""Reads a compiled XLA program's text, as far as it takes to follow a parameter to where it is used."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
# What hands a buffer on without touching it.
_TRANSPARENT = ("bitcast", "optimization-barrier")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: "bitcast.3", "bitcast".
      type: shape and layout, "u8[8192,3584]{1,0}".
      operands: names of other instructions of the computation; a parameter's is its number.
      called: the computation that it runs, of a fusion, call or while loop, else "".
      index: of a get-tuple-element, else -1.
      attributes: the rest of the line.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    called: str
    index: int
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        """What a parameter of the program is called in Python: `args[2].codes`."""
        name = re.search(r'op_name="([^"]*)"', self.attributes)
        return name.group(1) if name else self.name


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's computations.

    Attributes:
      computations: name -> instructions.
      entry: name of the one that runs.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @property
    def parameters(self) -> tuple[Instruction, ...]:
        """The program's parameters, in order."""
        found = [i for i in self.computations[self.entry] if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.operands[0])))

    def uses(self, parameter: Instruction) -> list[Instruction]:
        """Lists what reads a parameter's bytes: through bitcasts, tuples, loops and calls, and through the slices of a
        scan that XLA has fused with the call of a kernel (it passes an address then)."""
        return list(dict.fromkeys(self._uses(self.entry, parameter.name, ())))

    def _uses(self, computation: str, name: str, path: tuple[int, ...]) -> Iterator[Instruction]:
        """Follows element `path` of a value through a computation."""
        for user in self.computations[computation]:
            for position, operand in enumerate(user.operands):
                if operand == name and user.opcode != "parameter":
                    yield from self._use(computation, user, position, path)

    def _use(self, computation, user, position, path) -> Iterator[Instruction]:
        if user.opcode in _TRANSPARENT:
            yield from self._uses(computation, user.name, path)
        elif user.opcode == "tuple":
            yield from self._uses(computation, user.name, (position, *path))
        elif user.opcode == "get-tuple-element":
            if path[:1] == (user.index,):
                yield from self._uses(computation, user.name, path[1:])
        elif user.opcode == "while":
            # What the loop hands back is another value, unless it is the same one, which was followed inside.
            yield from self._inside(user, 0, path)
        elif user.opcode == "call" or (user.opcode == "fusion" and self._calls_kernel(user)):
            yield from self._inside(user, position, path)
        elif user.opcode == "dynamic-slice" and self._has_kernel(computation):
            yield from self._uses(computation, user.name, path)
        else:
            yield user

    def _inside(self, user: Instruction, position: int, path) -> Iterator[Instruction]:
        for inner in self.computations[user.called]:
            if inner.opcode == "parameter" and int(inner.operands[0]) == position:
                yield from self._uses(user.called, inner.name, path)

    def _calls_kernel(self, fusion: Instruction) -> bool:
        return self._has_kernel(fusion.called)

    def _has_kernel(self, computation: str) -> bool:
        wrapped = computation != self.entry
        return wrapped and any(i.opcode == "custom-call" for i in self.computations[computation])


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head.group(2), []
            entry = name if head.group(1) else entry
        elif line.startswith("}") and name:
            computations[name], name = tuple(lines), ""
        elif name:
            instruction = _instruction(line)
            if instruction:
                lines.append(instruction)
    if entry not in computations:
        raise ValueError(f"no entry computation in {text[:80]!r}")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    root, name, rest = match.groups()
    type_end = _end_of_type(rest)
    opcode, _, after = rest[type_end:].strip().partition("(")
    inside = after[: _closing(after)]
    attributes = after[len(inside) + 1 :]
    called = _CALLED.search(attributes)
    index = re.search(r"\bindex=(\d+)", attributes)
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        type=rest[:type_end].strip(),
        operands=_operands(opcode.strip(), inside),
        called=called.group(1) if called else "",
        index=int(index.group(1)) if index else -1,
        attributes=attributes,
        root=bool(root),
    )


def _operands(opcode: str, inside: str) -> tuple[str, ...]:
    if opcode == "parameter":
        return (inside.strip(),)
    return tuple(re.findall(r"%([\w.\-]+)", inside))


def _end_of_type(text: str) -> int:
    """Where the type ends: at the bracket that closes a tuple's, or at the first space."""
    return _closing(text[1:]) + 2 if text.startswith("(") else text.find(" ")


def _closing(text: str) -> int:
    """Index of the bracket that closes one opened before the text."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    return len(text)
