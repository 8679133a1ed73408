"""Job scripts, read without running them: comments, simple commands, variables set and used. Standard library only.

A reader of bash's grammar as far as job scripts need it: quotes, continuations, here-documents, expansions, compound
commands, functions. What it cannot understand it skips; it never raises and never executes anything.
"""

from __future__ import annotations

import itertools
import re
import shlex
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

_NAME = r"[A-Za-z_]\w*"
_ASSIGNMENT = re.compile(rf"({_NAME})(?:\[[^]=]*\])?\+?=")
_REDIRECTION = re.compile(r"(?:\d+|\{\w+\})?(&>>|&>|<<<|<<-|<<|<>|<&|>>|>&|>\||<(?!\()|>(?!\())")
_CONTROL = re.compile(r";;&|;;|;&|&&|\|\||\|&|;|&|\||\(|\)|\n")
_DECLARES = {"export", "declare", "typeset", "local", "readonly"}
_GUARDS = (":-", "-", ":+", "+", ":=", "=", ":?", "?")
_SHELLS = {"bash", "sh", "dash", "zsh"}


@dataclass
class Block:
    """A compound command. `kind`: script, function, loop, condition, branch, group, subshell, substitution or nested
    (the string of `bash -c`); `name` of a function; `owner` of a nested script: the command that runs it."""

    kind: str
    parent: Block | None = None
    name: str = ""
    before: str = ";"
    after: str = ";"
    background: bool = False
    owner: Command | None = None
    lines: tuple[int, int] = (0, 0)
    """First and last."""

    def chain(self) -> Iterator[Block]:
        """This block and those around it."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.parent


@dataclass
class Command:
    """A simple command: its words without quotes, expansions as they stand, without the assignments before it."""

    line: int
    words: tuple[str, ...]
    block: Block
    before: str = ";"
    """The operator before it; "!" where its exit code is negated."""
    after: str = ";"
    background: bool = False
    prefix: tuple[tuple[str, str], ...] = ()
    """`NAME=value` before the program, for it alone."""

    @property
    def program(self) -> str:
        return PurePath(self.words[0]).name if self.words and self.words[0] else ""

    @property
    def in_background(self) -> bool:
        return self.background or any(block.background for block in self.block.chain())

    @property
    def tested(self) -> bool:
        """Whether the script looks at its exit code where it stands, so that `set -e` does not act."""
        if self.before == "!" or self.after in ("&&", "||"):
            return True
        around = list(self.block.chain())
        return any(block.kind == "condition" or block.after in ("&&", "||") for block in around)

    def inside(self, kind: str) -> Block | None:
        """The innermost block of that kind around it."""
        return next((block for block in self.block.chain() if block.kind == kind), None)


@dataclass(frozen=True)
class Assignment:
    name: str
    value: str
    """Without quotes, expansions as they stand; an array is "(a b)"."""
    line: int
    exported: bool
    has_value: bool = True
    """False for a bare `export NAME`."""


@dataclass(frozen=True)
class Use:
    name: str
    line: int
    guarded: bool
    """Whether the script provides for its absence: `${X:-1}`, `${X:?message}`, `[ -n "$X" ]`."""


@dataclass
class Script:
    """What a script says."""

    text: str
    comments: list[tuple[int, str]] = field(default_factory=list)
    """(line, text from the start of that line)."""
    commands: list[Command] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    defined: dict[str, int] = field(default_factory=dict)
    """Names set by `for`, `read`, `printf -v`, ... -> line."""
    blocks: list[Block] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)
    """(line, target) of redirections."""

    @property
    def first_command(self) -> int:
        """Line of the first command; schedulers read directives only before it. 0: there is none."""
        lines = [command.line for command in self.commands] + [entry.line for entry in self.assignments]
        return min(lines, default=0)

    def assigned(self, name: str, before: int | None = None) -> Assignment | None:
        """The last assignment with a value (of those before a line)."""
        found = [
            entry
            for entry in self.assignments
            if entry.name == name and entry.has_value and (before is None or entry.line <= before)
        ]
        return found[-1] if found else None

    def resolve(self, text: str, before: int | None = None, depth: int = 5) -> str:
        """`text` with the script's own static values put in; what is not known stays as `$NAME`."""

        def value(match: re.Match[str]) -> str:
            name, default = match["plain"] or match["name"], match["default"]
            found = self.assigned(name, before)
            if found is not None and not re.search(rf"\$\{{?{name}\b", found.value):
                return self.resolve(found.value, before, depth - 1)
            return match[0] if default is None else default

        pattern = rf"\$(?:(?P<plain>{_NAME})|\{{(?P<name>{_NAME})(?:\[[@*]\])?(?::?-(?P<default>[^{{}}$]*))?\}})"
        return re.sub(pattern, value, text) if depth and "$" in text else text

    def expanded(self, command: Command) -> tuple[str, ...]:
        """Its words, with variables that stand for several words (`$LAUNCH`, "${OPTIONS[@]}") taken apart."""
        result: list[str] = []
        for word in command.words:
            text = self.resolve(word, command.line)
            whole = re.fullmatch(rf"\$(?:{_NAME}|\{{{_NAME}(?:\[[@*]\])?\}})", word) and text != word
            apart = whole and (text.startswith("(") or not re.search(r"\$[{(]", text))
            result += _split(text.strip().removeprefix("(").removesuffix(")")) if apart else [text]
        return tuple(result)


def read(text: str) -> Script:
    """Read a script. Never raises: what is not understood is skipped."""
    script = Script(text)
    _Reader(script, text, 1).items(Block("script"), ())
    return script


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


class _Reader:
    """Recursive descent over `text`, whose first line is number `first` of the script; fills `script`."""

    def __init__(self, script: Script, text: str, first: int):
        self.script, self.text, self.first = script, text, first
        self.pos = 0
        self.starts = [0] + [match.end() for match in re.finditer("\n", text)]
        self.pending: list[tuple[str, bool, bool]] = []
        """Here-documents announced on this line: (delimiter, expands, tabs stripped)."""
        self.conditional = False

    # ---- places -------------------------------------------------------------------------------------------------

    def line(self, pos: int | None = None) -> int:
        return self.first - 1 + bisect_right(self.starts, self.pos if pos is None else pos)

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.pos)

    def keyword(self) -> str:
        match = re.compile(r"[^\s;&|()<>'\"$`]+").match(self.text, self.pos)
        return match[0] if match else ""

    def blank(self, newlines: bool = True) -> None:
        """Skip spaces, continuations and comments; with `newlines`, those and here-documents, too."""
        while self.pos < len(self.text):
            if self.peek("\\\n"):
                self.pos += 2
            elif self.text[self.pos] in " \t\r":
                self.pos += 1
            elif self.text[self.pos] == "#":
                end = self.text.find("\n", self.pos)
                end = len(self.text) if end < 0 else end
                start = self.starts[bisect_right(self.starts, self.pos) - 1]
                self.script.comments.append((self.line(), self.text[start:end].rstrip()))
                self.pos = end
            elif self.text[self.pos] == "\n" and newlines:
                self.newline()
            else:
                return

    def newline(self) -> None:
        self.pos += 1
        pending, self.pending = self.pending, []
        for delimiter, expands, tabs in pending:
            start = self.pos
            while self.pos < len(self.text):
                end = self.text.find("\n", self.pos)
                end = len(self.text) if end < 0 else end
                row, row_start, self.pos = self.text[self.pos : end], self.pos, min(end + 1, len(self.text))
                if (row.lstrip("\t") if tabs else row) == delimiter:
                    break
            else:
                row_start = len(self.text)
            if expands:
                resume, self.pos = self.pos, start
                self.expansions(row_start)
                self.pos = resume

    # ---- lists of commands --------------------------------------------------------------------------------------

    def items(self, block: Block, until: Collection[str]) -> str:
        """Commands up to one of `until` (keywords, ")" or ";;"), which is consumed and returned; "" at the end."""
        self.script.blocks.append(block)
        first = self.line()
        end = self.list_(block, until)
        block.lines = first, self.line(max(self.pos - 1, 0))
        return end

    def list_(self, block: Block, until: Collection[str]) -> str:
        members: list[Command | Block] = []  # of the and-or list at hand: what an & after it puts into the background
        before = ";"
        while True:
            self.blank()
            if self.pos >= len(self.text):
                return ""
            word = self.keyword()
            if word in until:
                self.pos += len(word)
                return word
            control = _CONTROL.match(self.text, self.pos)
            if control and control[0] in until:
                self.pos = control.end()
                return control[0]
            if control and control[0] != "(":
                self.pos = control.end()  # stray
                before = ";"
                continue
            start = self.pos
            item = self.command(block, before)
            if self.pos == start:
                self.pos += 1  # not understood
            self.blank(newlines=False)
            control = _CONTROL.match(self.text, self.pos)
            operator = control[0] if control and control[0] not in until else ""
            if operator in ("&&", "||", "|", "|&", "&", ";"):
                self.pos += len(operator)
            if item is not None:
                item.after = operator if operator in ("&&", "||", "|", "|&", "&") else ";"
                members.append(item)
            if operator == "&":
                for member in members:
                    member.background = True
            before = item.after if item is not None else ";"
            if before not in ("&&", "||", "|", "|&"):
                before, members = ";", []

    def command(self, parent: Block, before: str) -> Command | Block | None:
        word = self.keyword()
        if word == "!":
            self.pos += 1
            self.blank(newlines=False)
            item = self.command(parent, "!")
            return item
        if word == "time":
            self.pos += 4
            self.blank(newlines=False)
            return self.command(parent, before)
        if self.peek("(("):
            return self.arithmetic(parent, before)
        compound = {"if": self.if_, "while": self.while_, "until": self.while_, "for": self.for_, "select": self.for_}
        compound |= {"case": self.case, "function": self.function}
        if word in compound:
            self.pos += len(word)
            item = compound[word](parent)
        elif word == "{" or self.peek("("):
            self.pos += 1
            item = Block("group" if word == "{" else "subshell", parent)
            self.items(item, {"}"} if word == "{" else {")"})
        elif re.compile(r"[\w:.-]+[ \t]*\([ \t]*\)").match(self.text, self.pos):
            item = self.function(parent)
        elif word == "[[":
            return self.brackets(parent, before)
        else:
            return self.simple(parent, before)
        item.before = before
        while self.redirection():
            pass
        return item

    def if_(self, parent: Block) -> Block:
        whole = Block("group", parent)
        end = "if"
        while end in ("if", "elif"):
            self.items(Block("condition", whole), {"then"})
            end = self.items(Block("branch", whole), {"elif", "else", "fi"})
        if end == "else":
            self.items(Block("branch", whole), {"fi"})
        return whole

    def while_(self, parent: Block) -> Block:
        loop = Block("loop", parent)
        self.items(Block("condition", loop), {"do"})
        self.items(loop, {"done"})
        return loop

    def for_(self, parent: Block) -> Block:
        self.blank(newlines=False)
        loop = Block("loop", parent)
        if self.peek("(("):
            self.arithmetic(loop, ";")
        else:
            self.script.defined.setdefault(self.word(), self.line())
            self.blank()
            if self.keyword() == "in":
                self.pos += 2
                self.words()
        self.items(Block("group", loop), {"do"})
        self.items(loop, {"done"})
        return loop

    def case(self, parent: Block) -> Block:
        whole = Block("group", parent)
        self.blank()
        self.word()
        self.blank()
        self.pos += len(self.keyword())  # in
        while True:
            self.blank()
            if self.pos >= len(self.text):
                return whole
            if self.keyword() == "esac":
                self.pos += 4
                return whole
            while self.pos < len(self.text) and self.text[self.pos] != ")":
                start = self.pos
                if self.text[self.pos] in "(| \t\n":
                    self.pos += 1
                else:
                    self.word()
                if self.pos == start:
                    self.pos += 1
            self.pos += 1
            if self.items(Block("branch", whole), {";;", ";&", ";;&", "esac"}) in ("esac", ""):
                return whole

    def function(self, parent: Block) -> Block:
        self.blank(newlines=False)
        match = re.compile(r"[\w:.-]+").match(self.text, self.pos)
        block = Block("function", parent, match[0] if match else "")
        self.pos += len(block.name)
        parentheses = re.compile(r"[ \t]*\([ \t]*\)").match(self.text, self.pos)
        self.pos = parentheses.end() if parentheses else self.pos
        self.blank()
        self.script.blocks.append(block)
        self.command(block, ";")
        return block

    def arithmetic(self, parent: Block, before: str) -> Command:
        """`((...))`, as a command whose words are "((" and the expression."""
        line = self.line()
        self.pos += 2
        expression = self.arithmetic_text()
        command = Command(line, ("((", expression), parent, before)
        self.script.commands.append(command)
        return command

    def arithmetic_text(self) -> str:
        """The expression up to `))`, consumed. Its names count as used, those it assigns as set."""
        start, depth = self.pos, 0
        while self.pos < len(self.text) and not (depth == 0 and self.peek("))")):
            depth += {"(": 1, ")": -1}.get(self.text[self.pos], 0)
            self.pos += 1
        expression = self.text[start : self.pos]
        for match in re.finditer(rf"(?<![\w$]){_NAME}", re.sub(r"\$\(.*?\)|\b0x\w+|\b\d+#\w+", "0", expression)):
            following = expression[match.end() :].lstrip()
            if re.match(r"(?:[-+*/%&|^]|<<|>>)?=(?!=)|\+\+|--", following) or expression[: match.start()].endswith(
                "++"
            ):
                self.script.defined.setdefault(match[0], self.line(start))
            else:
                self.script.uses.append(Use(match[0], self.line(start), False))
        end, self.pos = self.pos, start
        self.expansions(end)
        self.pos = min(end + 2, len(self.text))
        return expression

    def brackets(self, parent: Block, before: str) -> Command:
        """`[[ ... ]]`, in which operators are words."""
        line, words = self.line(), ["[["]
        self.pos += 2
        self.conditional = True
        while self.pos < len(self.text) and words[-1] != "]]":
            self.blank()
            operator = re.compile(r"&&|\|\||[<>()|&;]").match(self.text, self.pos)
            start = self.pos
            if operator:
                words.append(operator[0])
                self.pos = operator.end()
            else:
                words.append(self.word())
            if self.pos == start:
                self.pos += 1
        self.conditional = False
        command = Command(line, tuple(words), parent, before)
        self.script.commands.append(command)
        return command

    def simple(self, parent: Block, before: str) -> Command | None:
        start, words, prefix, lines = self.pos, list[str](), list[tuple[str, str]](), list[int]()
        line, exports = self.line(), False
        while True:
            self.blank(newlines=False)
            if self.redirection():
                continue
            if self.pos >= len(self.text) or _CONTROL.match(self.text, self.pos):
                break
            begin = self.pos
            lines.append(self.line())
            assignment = _ASSIGNMENT.match(self.text, self.pos)
            word = self.word()
            if self.pos == begin:
                self.pos += 1
                continue
            if assignment and not words:
                value = word[len(assignment[0]) :]
                prefix.append((assignment[1], self.appended(assignment[1], value) if "+=" in assignment[0] else value))
            elif words and words[0] in _DECLARES:
                exports = words[0] == "export" or "-x" in words or (words[0] == "declare" and "-gx" in words)
                declared = re.match(_NAME, word)
                if declared:
                    value = word[len(assignment[0]) :] if assignment else ""
                    entry = Assignment(declared[0], value, self.line(begin), exports, assignment is not None)
                    self.script.assignments.append(entry)
                words.append(word)
            else:
                words.append(word)
                self.conditional = words[0] in ("[", "test")
        self.conditional = False
        if not words and not prefix:
            return None if self.pos == start else Command(line, (), parent, before)
        command = Command(line, tuple(words), parent, before, prefix=tuple(prefix) if words else ())
        for name, value in prefix:
            self.script.assignments.append(Assignment(name, value, line, bool(words)))
        if words:
            self.script.commands.append(command)
            self.define(command)
            self.nested(command, lines[len(prefix) :])
        return command

    def appended(self, name: str, value: str) -> str:
        """What `name+=value` makes of the value so far."""
        former = self.script.assigned(name)
        if former is None:
            return value
        both = former.value.endswith(")") and value.startswith("(")
        return f"{former.value[:-1]} {value[1:]}" if both else former.value + value

    def define(self, command: Command) -> None:
        """What builtins and `env`, `-x NAME=value`, `--export=NAME=value` set."""
        words, line = command.words, command.line
        plain = [word for word in words[1:] if re.fullmatch(_NAME, word)]
        if command.program in ("read", "mapfile", "readarray"):
            names = plain
        elif command.program == "printf" and "-v" in words[:-1]:
            names = [words[words.index("-v") + 1]]
        elif command.program == "getopts":
            names = [*plain[-1:], "OPTARG", "OPTIND"]
        elif command.program == "let":
            names = [match[0] for match in map(re.compile(_NAME).match, words[1:]) if match]
        else:
            names = []
        for name in names:
            self.script.defined.setdefault(name, line)
        if command.program in _DECLARES:
            return
        for previous, word in itertools.pairwise(words):
            texts = [word] if previous in ("-x", "-env", "env") else []
            texts += word.partition("=")[2].split(",") if word.startswith("--export=") else []
            for text in texts:
                if found := _ASSIGNMENT.match(text):
                    self.script.assignments.append(Assignment(found[1], text[found.end() :], line, True))

    def nested(self, command: Command, lines: list[int]) -> None:
        """Read the string of `bash -c` as the script it is."""
        words = zip(command.words, command.words[1:], command.words[2:], lines[2:], strict=False)
        for shell, option, text, line in words:
            if PurePath(shell or "x").name in _SHELLS and re.fullmatch(r"-\w*c", option):
                block = Block("nested", command.block, owner=command)
                _Reader(self.script, text, line).items(block, ())

    # ---- words --------------------------------------------------------------------------------------------------

    def words(self) -> list[str]:
        """The words up to the next operator or end of line."""
        result: list[str] = []
        while True:
            self.blank(newlines=False)
            start = self.pos
            if self.pos >= len(self.text) or _CONTROL.match(self.text, self.pos):
                return result
            result.append(self.word())
            if self.pos == start:
                self.pos += 1

    def redirection(self) -> bool:
        """Skip one redirection, noting a here-document."""
        self.blank(newlines=False)
        match = _REDIRECTION.match(self.text, self.pos)
        if not match:
            return False
        self.pos = match.end()
        self.blank(newlines=False)
        begin = self.pos
        target = self.word()
        raw = self.text[begin : self.pos]
        if match[1] in ("<<", "<<-"):
            self.pending.append((target, not re.search(r"['\"\\]", raw), match[1] == "<<-"))
        elif match[1] != "<<<" and not match[1].endswith("&"):
            self.script.files.append((self.line(begin), match[1] + target))
        return True

    def word(self) -> str:
        """One word without its quotes; "" if there is none here."""
        result: list[str] = []
        begin = self.pos
        while self.pos < len(self.text):
            char = self.text[self.pos]
            if char == "\\":
                result.append("" if self.peek("\\\n") else self.text[self.pos + 1 : self.pos + 2])
                self.pos += 2
            elif char == "'":
                result.append(self.quoted())
            elif self.peek("$'"):
                self.pos += 1
                result.append(self.quoted())
            elif char == '"' or self.peek('$"'):
                self.pos += 1 if char == '"' else 2
                result.append(self.double())
            elif char in "$`" or self.peek("<(") or self.peek(">("):
                result.append(self.expansion())
            elif char == "(" and re.fullmatch(rf"{_NAME}\+?=", self.text[begin : self.pos]):
                result.append(self.array())
            elif char == "(" and result and result[-1][-1:] in tuple("@?*+!") and begin < self.pos:
                end = self.text.find(")", self.pos)  # an extended glob
                end = len(self.text) if end < 0 else end + 1
                result.append(self.text[self.pos : end])
                self.pos = end
            elif char in " \t\r\n;&|()<>":
                break
            else:
                result.append(char)
                self.pos += 1
        return "".join(result)

    def quoted(self) -> str:
        end = self.text.find("'", self.pos + 1)
        end = len(self.text) if end < 0 else end
        text = self.text[self.pos + 1 : end]
        self.pos = end + 1
        return text

    def double(self) -> str:
        """What follows a double quote, up to the next, consumed."""
        result: list[str] = []
        while self.pos < len(self.text) and self.text[self.pos] != '"':
            char = self.text[self.pos]
            if char == "\\":
                following = self.text[self.pos + 1 : self.pos + 2]
                result.append("" if following == "\n" else following if following in '$`"\\' else char + following)
                self.pos += 2
            elif char in "$`":
                result.append(self.expansion())
            else:
                result.append(char)
                self.pos += 1
        self.pos += 1
        return "".join(result)

    def array(self) -> str:
        """`(a b c)` of an assignment, elements quoted where needed."""
        elements: list[str] = []
        self.pos += 1
        while True:
            self.blank()
            if self.pos >= len(self.text) or self.text[self.pos] == ")":
                self.pos += 1
                return "(" + " ".join(_requote(element) for element in elements) + ")"
            start = self.pos
            elements.append(self.word())
            if self.pos == start:
                self.pos += 1

    def expansions(self, end: int) -> None:
        """Note the expansions of a text in which quotes mean nothing: a here-document, an arithmetic expression."""
        while self.pos < end:
            if self.text[self.pos] == "\\":
                self.pos += 2
            elif self.text[self.pos] in "$`":
                self.expansion()
            else:
                self.pos += 1

    def expansion(self) -> str:
        """What begins with $, ` or <( here; returned as it stands."""
        begin = self.pos
        if self.peek("$(("):
            self.pos += 3
            self.arithmetic_text()
        elif self.peek("$(") or self.peek("<(") or self.peek(">("):
            self.pos += 2
            pending, self.pending = self.pending, []
            conditional, self.conditional = self.conditional, False
            self.items(Block("substitution", Block("script")), {")"})
            self.pending, self.conditional = pending, conditional
        elif self.peek("${"):
            self.parameter()
        elif self.peek("`"):
            end = self.text.find("`", self.pos + 1)
            end = len(self.text) if end < 0 else end
            inner = _Reader(self.script, self.text[self.pos + 1 : end], self.line())
            inner.items(Block("substitution", Block("script")), ())
            self.pos = end + 1
        elif match := re.compile(rf"\$({_NAME})").match(self.text, self.pos):
            self.pos = match.end()
            self.script.uses.append(Use(match[1], self.line(begin), self.conditional))
        else:
            self.pos += 2 if re.compile(r"\$[0-9@*#?$!-]").match(self.text, self.pos) else 1
        return self.text[begin : self.pos]

    def parameter(self) -> None:
        """`${...}`"""
        begin = self.pos
        match = re.compile(rf"\$\{{[#!]?({_NAME})?").match(self.text, self.pos)
        assert match
        self.pos = match.end()
        operator = re.compile(r"\[[^]]*\]").sub("", self.text[self.pos : self.pos + 200], count=1)
        operator = operator if self.peek("[") else self.text[self.pos : self.pos + 2]
        guard = next((word for word in _GUARDS if operator.startswith(word)), None)
        if match[1]:
            self.script.uses.append(Use(match[1], self.line(begin), guard is not None or self.conditional))
            if guard in (":=", "="):
                self.script.defined.setdefault(match[1], self.line(begin))
        while self.pos < len(self.text) and self.text[self.pos] != "}":
            char = self.text[self.pos]
            if char == "\\":
                self.pos += 2
            elif char == "'" and "'" in self.text[self.pos + 1 :].partition("\n")[0]:
                self.quoted()
            elif char == '"':
                self.pos += 1
                self.double()
            elif char in "$`":
                self.expansion()
            else:
                self.pos += 1
        self.pos += 1


def _requote(word: str) -> str:
    return word if re.fullmatch(r"[^\s'\"]+", word) else f'"{word}"' if '"' not in word else f"'{word}'"
