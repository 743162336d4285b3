"""Damaged search files, plan files, model folders and texts, each given to a command in this process.

A mistake of a user's ends with exit code 2 and a line; what is still right with 0. Printed is how many ended in which
code, and every input that hung, left a traceback, or ended in another code: `python benchmarks/fuzz.py [SEED]`, or
`python benchmarks/fuzz.py SEED KIND NUMBER` for one input whose folder is kept.

Search files and texts go through `validate`. Plan files and model folders go through `evaluate` over a replica in this
process, which loads the model, makes the reference and measures the plan, as the first minutes of `run` do.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

import dtmsearch
from dtmsearch.cli import main
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.modules.discovery import read_manifest

COUNTS = {"search files": 1000, "plan files": 500, "model folders": 150, "texts": 50}
LIMIT_SECONDS = 60.0
MODEL = Path(dtmsearch.__file__).parent / "demo" / "model"
CORE = Path(dtmsearch.__file__).parent / "core"
WRITTEN, HELD_OUT = ((CORE / name).read_text(encoding="utf-8")[:9000] for name in ("schemes.py", "plan.py"))

SEARCH: dict[str, Any] = {
    "run": "fuzz",
    "model": {"path": str(MODEL), "dtype": "float32"},
    "prompts": {"files": ["text.txt"], "count": 2, "prompt_tokens": 8, "continuation_tokens": 4, "seed": 0},
    "validation": {"files": ["held-out.txt"], "count": 2},
    "search": {
        "strategy": "beam",
        "rank_by": "fdt",
        "width": 2,
        "schemes": ["int8-channel", "int4-g32"],
        "components": {"include": ["*"], "exclude": []},
        "tied": [],
        "stop": {"share": 0.8},
    },
    "seed": 0,
}
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "sparsity", "rounds": [20, 10], "prune": "wanda", "recovery": {"files": ["text.txt"]}},
    {"strategy": "auto", "schemes": ["gptq-int4-g32", "int8-channel"], "stop": {"bits_per_weight": 6}},
    {"strategy": "evolution", "schemes": ["int4-g32", "int8-channel"], "stop": {"bits_per_weight": 6}},
)
# Values that somebody may write where another was meant, and some that nobody would.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**6, 10**30, 0.0, -0.5, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "a", "x" * 5000, "*", "[", "**x", "..", "../..", "/", "~nobody/x", "/dev/null", "/dev/zero", "a\0b"),
    *(
        "int8-channel",
        "int4-g0",
        "int4-g" + "9" * 5000,
        "wanda-0.0",
        "wanda-2:0",
        "dense",
        "drop",
        "nf4",
        "gptq-int4-g32",
    ),
    *(
        "run",
        "none",
        "null",
        "1e3",
        "\u202e",
        "\x1b[31m",
        "\U0001f600",
        "float8",
        "text.txt",
        "held-out.txt",
        "missing.txt",
    ),
    *([], {}, [[]], [None], [1, 2], ["int8-channel"], ["q", "k"], {"a": 1}, {"files": 1}, {"path": []}, [{"a": [{}]}]),
)
# Changes of the search file that are right, or wrong only for this model, these texts or this strategy.
PLAUSIBLE: tuple[tuple[str, Any], ...] = (
    *((f"search.strategy={name}", ()) for name in ("probe", "greedy", "beam", "lazy_greedy", "lazy_beam", "knapsack")),
    *((f"search.strategy={name}", ()) for name in ("sensitivity", "auto", "spdy", "evolution", "local", "sparsity")),
    *((f"search.rank_by={name}", ()) for name in ("fdt", "sdt", "dppl", "ppl", "kl")),
    ("search.components.include", (["q"], ["*attn*"], ["lm_head"], ["embed_tokens"], ["norm"], ["model.layers.9.*"])),
    ("search.components.exclude", (["*"], ["q", "k"], ["nothing"], ["[a"])),
    ("search.tied", ([["q", "k", "v"]], [["q"], ["q"]], [["q", "nothing"]], [["gate", "up"], ["up", "down"]], [[]])),
    (
        "search.schemes",
        (["wanda-2:4"], ["gptq-int3-g64"], ["drop"], ["int4-g999999"], ["int8-channel", "int8-channel"]),
    ),
    ("search.stop", ({}, {"share": 1}, {"components": 10**6}, {"bits_per_weight": 0.001}, {"sparsity": 0.99})),
    ("search.stop", ({"size_mb": 1e-9}, {"size_mb": 2}, {"min_fdt": 3}, {"min_fdt": 1e9}, {"seconds": 1e-9})),
    ("search.width", (1, 1000)),
    ("search.confidence", (0.9, 1.0)),
    ("search.fused", (True, False)),
    ("search.rounds", ([20], [50, 60], [1e-9])),
    ("search.prune", ("wanda", "sparsegpt", "random")),
    ("search.allocate", ("owl", "uniform", "fdt75")),
    ("prompts.count", (1, 10, 10**5)),
    ("prompts.prompt_tokens", (1, 100, 10**6)),
    ("prompts.files", (["text.txt", "held-out.txt"], ["*.txt"], ["search.yaml"], ["text.txt", "text.txt"])),
    ("validation", (None, {"count": 1}, {"files": ["text.txt"]}, {"count": 10**5})),
    ("calibration", ({"count": 4}, {"tokens": 10**6}, {"files": ["held-out.txt"], "count": 2})),
    ("model.dtype", ("float16", "bfloat16")),
    ("model.path", ("nowhere/nothing", "./nowhere", "gpt2", "text.txt")),
    ("model.revision", ("main", "v0")),
    ("model.compile", ("always", "never")),
    ("model.scale_dtype", ("float16",)),
    ("seed", (1, 2**40)),
    ("run", ("other", "a" * 100, "a" * 101, "-x", "x/y")),
)
YAML_BITS = (
    *("!!bool maybe", "!!int x", "!!float y", "!!timestamp z", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]"),
    *("!!pairs [a: 1]", "!!python/object:os.system x", "2026-13-45", "2026-01-01", "190:20:30", "0o9", ".inf", ".nan"),
    *(
        "1_0",
        "9" * 5000,
        "? [a]: b",
        "*nowhere",
        "&a [*a]",
        "&a a",
        "\t",
        "\0",
        "%YAML 9.9",
        "---",
        "...",
        "|",
        ">",
        "@",
    ),
    *("`", '"\\ud800"', '"\\0"', "'", "{", "[", "}", "]", ": ", "- ", "\ufeff", "<<: *a", "~", "#", "\r", "\x85"),
)


@dataclass
class Ended:
    """How an input ended: the exit code, or what went wrong in its place; and what was said."""

    code: int | str
    said: str
    seconds: float

    @property
    def wrong(self) -> bool:
        return self.code not in (0, 2) or "raceback" in self.said


class Hung(BaseException):
    """The command took longer than it may."""


# Inputs. Each is made in a folder of its own, by a generator of random numbers that its number seeds.


def search_file(folder: Path, chance: random.Random) -> list[str]:
    write_texts(folder)
    content = copy.deepcopy(SEARCH)
    if chance.random() < 0.4:
        content["search"] = {"components": {}, **copy.deepcopy(chance.choice(STRATEGIES))}
    kind = chance.choice(("values", "values", "plausible", "plausible", "text", "text", "bits", "whole"))
    if kind == "plausible":
        for _ in range(chance.randint(1, 2)):
            change(content, chance)
    if kind == "values":
        for _ in range(chance.randint(1, 3)):
            mutate(content, chance)
    text = dumped(content)
    if kind == "text":
        text = damaged_text(text, chance)
    if kind == "bits":
        lines = text.splitlines()
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(len(lines))
            bit = chance.choice(YAML_BITS)
            lines[at] = chance.choice((f"{lines[at].partition(':')[0]}: {bit}", lines[at] + bit, bit))
        text = "\n".join(lines) + "\n"
    data = text.encode("utf-8", "surrogatepass")
    if kind == "whole":
        data = chance.choice(WHOLE)(text)
    (folder / "search.yaml").write_bytes(data)
    return ["validate", str(folder / "search.yaml")]


WHOLE: tuple[Callable[[str], bytes], ...] = (
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: b"",
    lambda text: b"\xff\xfe\x00" * 100,
    lambda text: os.urandom(300),
    lambda text: ("[" * 100_000).encode(),
    lambda text: ("a: " * 3000 + "1").encode(),
    lambda text: ("".join(f"{'  ' * level}a:\n" for level in range(1500))).encode(),
    lambda text: (text + "---\n" + text).encode(),
    lambda text: (text + text).encode(),
    lambda text: alias_bomb("[{}]", 12).encode() + text.encode(),
    lambda text: text.encode() + alias_bomb("[{}]", 12).encode(),
    lambda text: text.encode() + merge_bomb(14).encode(),
    lambda text: (text + "loop: &loop [*loop]\n").encode(),
    lambda text: (text + "loop: &loop {loop: *loop}\n").encode(),
    lambda text: ("- a\n" * 5000).encode(),
    lambda text: json.dumps(yaml.safe_load(text)).encode(),
)


def alias_bomb(form: str, levels: int) -> str:
    """Ten of ten of ten ... of one value."""
    lines = ["a0: &a0 lol"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {form.format(inner)}")
    return "\n".join(lines) + "\n"


def merge_bomb(levels: int) -> str:
    lines = ["m0: &m0 {k: 1}"]
    for level in range(1, levels):
        inner = ", ".join([f"*m{level - 1}"] * 10)
        lines.append(f"m{level}: &m{level} {{<<: [{inner}]}}")
    return "\n".join(lines) + "\n"


def plan_file(folder: Path, chance: random.Random) -> list[str]:
    write_texts(folder)
    (folder / "search.yaml").write_text(dumped(SEARCH))
    manifest = read_manifest(ModelSpec(str(MODEL), dtype="float32"))
    names = [component.name for component in manifest.components]
    schemes = {name: chance.choice(("int8-channel", "nf4", "wanda-0.5")) for name in chance.sample(names, 3)}
    content = {"model": str(MODEL), "manifest_id": manifest.id, "weights_id": "", "schemes": schemes}
    kind = chance.choice(("values", "values", "schemes", "text", "whole"))
    if kind == "values":
        mutate(content, chance)
    if kind == "schemes":
        name = chance.choice((*names, "lm_head", "model.norm", "model.embed_tokens", "model", "x" * 3000, "a\0b", ""))
        schemes[name] = chance.choice(ODD)
    text = json.dumps(content, indent=1)
    if kind == "text":
        text = damaged_text(text, chance)
    data = text.encode("utf-8", "surrogatepass")
    if kind == "whole":
        nested = {"model": "m", "manifest_id": manifest.id, "schemes": "S"}
        deep = json.dumps(nested).replace('"S"', "[" * 50_000 + "]" * 50_000)
        whole = (
            *(b"", b"null", b"[]", b'"text"', b"\xff\xfe", text.encode("utf-16"), deep.encode(), b"[" * 100_000),
            *(b"9" * 5000, b'{"a":' * 5000, text.encode("utf-8-sig"), text[:-20].encode(), b"NaN", os.urandom(200)),
        )
        data = chance.choice(whole)
    (folder / "plan.json").write_bytes(data)
    return evaluated(folder, str(folder / "plan.json"))


def model_folder(folder: Path, chance: random.Random) -> list[str]:
    write_texts(folder)
    model = folder / "model"
    shutil.copytree(MODEL, model, copy_function=os.link)
    content = copy.deepcopy(SEARCH)
    content["model"]["path"] = str(model)
    (folder / "search.yaml").write_text(dumped(content))
    damage = chance.choice((damage_config, damage_config, damage_index, damage_file, damage_entry, damage_weights))
    damage(model, chance)
    return evaluated(folder, "uniform:int8-channel")


def damage_config(model: Path, chance: random.Random) -> None:
    """A key of config.json has another value."""
    config = json.loads((model / "config.json").read_text())
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    key = chance.choice((*config, *sizes, *sizes, "model_type", "num_key_value_heads", "head_dim", "layer_types"))
    odd = (*ODD, -1, 3, 1_000_000, 10**12, "gpt2", "mixtral", "t5", "whisper", "gemma3", "llava", "bert", "mamba")
    value = chance.choice(odd)
    if value == 1 and chance.random() < 0.5:
        config.pop(key, None)
    else:
        config[key] = value
    rewrite(model / "config.json", json.dumps(config).encode())


def damage_index(model: Path, chance: random.Random) -> None:
    """An index that is odd, or leads elsewhere."""
    name = "model.safetensors"
    whole = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), name)
    maps: tuple[Any, ...] = (
        *(whole, {}, [], None, "x", {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": "/etc/passwd"}, {"a": "../../x"}),
        *({"a": "sub/x.safetensors"}, {"a": ""}, {"a": "."}, {"a": "a\0b"}, {"a": "x" * 5000}, {"a": "config.json"}),
        *({"a": str(model.parent / "text.txt")}, {"a": "../text.txt"}, {"a": name, "b": "gone.safetensors"}),
    )
    texts = (b"", b"[]", b"null", b'{"weight_map": ', b"\xff", b"[" * 100_000, b"9" * 5000)
    chosen = chance.choice((*maps, *texts))
    if not isinstance(chosen, bytes):
        chosen = json.dumps({"metadata": {}, "weight_map": chosen}).encode()
    rewrite(model / "model.safetensors.index.json", chosen)


def damage_file(model: Path, chance: random.Random) -> None:
    """Bytes of a file of text are others."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    path = model / chance.choice(names)
    text = path.read_text()
    if chance.random() < 0.5 and path.name != "tokenizer.json":
        content = json.loads(text)
        mutate(content, chance)
        rewrite(path, json.dumps(content).encode())
    else:
        rewrite(path, damaged_text(text, chance).encode("utf-8", "surrogatepass"))


def damage_entry(model: Path, chance: random.Random) -> None:
    """A file of the folder is something else, or nothing."""
    path = chance.choice(sorted(model.iterdir()))
    if chance.random() < 0.2:
        path = model / chance.choice(("chat_template.jinja", "special_tokens_map.json", "more.safetensors"))
    path.unlink(missing_ok=True)
    kind = chance.choice(("gone", "folder", "pipe", "zero", "full", "loop", "dangling", "empty", "random"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("zero", "full", "loop", "dangling"):
        path.symlink_to({"zero": "/dev/zero", "full": "/dev/full", "loop": path, "dangling": "nowhere"}[kind])
    elif kind in ("empty", "random"):
        path.write_bytes(b"" if kind == "empty" else chance.randbytes(1000))


def damage_weights(model: Path, chance: random.Random) -> None:
    """The header of the weights says something else, or the file is cut."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = chance.choice(("cut", "length", "header", "name", "entry", "entry", "text", "more"))
    if kind == "cut":
        data = data[: chance.choice((0, 5, 8, 100, size, size + 8, len(data) - 1))]
    elif kind == "length":
        data = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little") + data[8:]
    elif kind == "more":
        data += b"more"
    else:
        name = chance.choice([name for name in header if name != "__metadata__"])
        if kind == "name":
            header[chance.choice(("", "x", "model.layers.99.q", name + "s"))] = header.pop(name)
        elif kind == "entry":
            key = chance.choice(("dtype", "shape", "data_offsets"))
            header[name][key] = chance.choice(
                (*ODD, "BF16", "F8_E4M3", "I64", [1, 2, 3], [-1, 4], [0, 10**30], [2**62, 4])
            )
        text = json.dumps(header)
        if kind == "text":
            text = damaged_text(text, chance)
        raw = chance.choice(("[]", "null", "{}", "[" * 100_000)) if kind == "header" else text
        encoded = raw.encode("utf-8", "surrogatepass")
        data = len(encoded).to_bytes(8, "little") + encoded + rest
    rewrite(path, data)


def text_file(folder: Path, chance: random.Random) -> list[str]:
    write_texts(folder)
    content = copy.deepcopy(SEARCH)
    name = chance.choice(
        ("odd.txt", "odd.txt.gz", "odd.txt.zst", "odd.zst", "odd", ".odd", "o\u0308dd.txt", "[odd].txt")
    )
    content["prompts"]["files"] = [chance.choice((name, name, "*odd*", str(folder / name)))]
    (folder / "search.yaml").write_text(dumped(content))
    path, data = folder / name, WRITTEN.encode()
    if name.endswith((".gz", ".zst")):
        data = gzip.compress(data) if name.endswith(".gz") else zstd(data)
    kinds = (
        "whole",
        "cut",
        "bytes",
        "empty",
        "random",
        "space",
        "line",
        "utf16",
        "pipe",
        "folder",
        "loop",
        "zero",
        "zeros",
    )
    kind = chance.choice(kinds)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "zero"):
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    else:
        flipped = bytearray(data)
        for _ in range(5):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        made = {
            "whole": data,
            "cut": data[: len(data) // 2],
            "bytes": bytes(flipped),
            "empty": b"",
            "random": chance.randbytes(20_000),
            "space": b" \n" * 10_000,
            "line": b"x" * 100_000,
            "utf16": WRITTEN.encode("utf-16"),
            "zeros": b"\0" * 50_000,
        }
        path.write_bytes(made[kind])
    return ["validate", str(folder / "search.yaml")]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


KINDS: Mapping[str, Callable[[Path, random.Random], list[str]]] = {
    "search files": search_file,
    "plan files": plan_file,
    "model folders": model_folder,
    "texts": text_file,
}


def write_texts(folder: Path) -> None:
    (folder / "text.txt").write_text(WRITTEN)
    (folder / "held-out.txt").write_text(HELD_OUT)


def evaluated(folder: Path, plan: str) -> list[str]:
    return [
        "evaluate",
        str(folder / "search.yaml"),
        "--plan",
        plan,
        "--store",
        str(folder / "store"),
        "--quiet",
        "--in-process",
    ]


def dumped(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=False)


def rewrite(path: Path, data: bytes) -> None:
    """Never through a link to the model that others use."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def change(content: dict[str, Any], chance: random.Random) -> None:
    """Set a key as somebody might."""
    key, values = chance.choice(PLAUSIBLE)
    key, equals, value = key.partition("=")
    *parents, last = key.split(".")
    at = content
    for parent in parents:
        at = at[parent]
    at[last] = value if equals else copy.deepcopy(chance.choice(values))
    if last == "dataset":
        at["files"] = []


def mutate(content: Any, chance: random.Random) -> None:
    """Change one place of nested values: another value, a key gone, a key too much."""
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.75:
            at = at[key]
            continue
        break
    kind = chance.random()
    if kind < 0.1:
        del at[key]
    elif kind < 0.2 and isinstance(at, dict):
        at[chance.choice((f"{key}s", f"{key[:-1]}", "", "x" * 500, "\x1b[1m"))] = at[key]
    else:
        at[key] = copy.deepcopy(chance.choice(ODD))


def damaged_text(text: str, chance: random.Random) -> str:
    """Some letters are others, gone, or there twice."""
    letters = list(text)
    for _ in range(chance.choice((1, 1, 3, 30))):
        at = chance.randrange(len(letters)) if letters else 0
        kind = chance.random()
        if kind < 0.4:
            letters[at : at + 1] = [chance.choice("\0\t\n\r :-[]{}\"'&*!|>%@`#,\\aZ09\x1b\x80\u2028\ud800\U0001f600")]
        elif kind < 0.6:
            del letters[at : at + chance.choice((1, 10, 100))]
        elif kind < 0.8:
            letters[at:at] = letters[at : at + chance.choice((1, 10, 100))]
        else:
            letters = letters[:at]
    return "".join(letters)


# Running them.


def ended(arguments: list[str], folder: Path) -> Ended:
    """How a command ends, in this process and within its time."""

    def hang(_signal: int, _frame: object) -> None:
        raise Hung

    said, started = io.StringIO(), time.monotonic()
    here, temporary = Path.cwd(), tempfile.tempdir
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    os.chdir(folder)
    tempfile.tempdir = str(folder)  # for traceback files
    code: int | str
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(arguments)
    except Hung:
        code = "hung"
    except BaseException as error:  # a fault of the benchmark's subject, whatever it is
        code = f"escaped: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)
        tempfile.tempdir = temporary
    return Ended(code, said.getvalue(), time.monotonic() - started)


def one(kind: str, seed: int, number: int, folder: Path) -> Ended:
    arguments = KINDS[kind](folder, random.Random(f"{seed} {kind} {number}"))  # noqa: S311 (not for secrets)
    return ended(arguments, folder)


@dataclass
class Tally:
    """How inputs of a kind ended, and those that ended as none should."""

    codes: Counter[int | str] = field(default_factory=Counter)
    wrong: list[tuple[int, Ended]] = field(default_factory=list)
    slowest: float = 0.0


def fuzz(kind: str, count: int, seed: int = 0) -> Tally:
    """Run `count` inputs of a kind; the first ones are the same however many there are."""
    tally = Tally()
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="dtmsearch-fuzz-") as folder:
            found = one(kind, seed, number, Path(folder))
        tally.codes[found.code] += 1
        tally.slowest = max(tally.slowest, found.seconds)
        if found.wrong:
            tally.wrong.append((number, found))
    return tally


def report(counts: Mapping[str, int], seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="dtmsearch-fuzz-") as folder:  # what is loaded once
        write_texts(Path(folder))
        (Path(folder) / "search.yaml").write_text(dumped(SEARCH))
        assert ended(evaluated(Path(folder), "uniform:int8-channel"), Path(folder)).code == 0
    num_wrong = 0
    for kind, count in counts.items():
        started = time.monotonic()
        tally = fuzz(kind, count, seed)
        codes = ", ".join(f"{code}: {times}" for code, times in sorted(tally.codes.items(), key=str))
        seconds = time.monotonic() - started
        print(f"{kind}: {count} inputs in {seconds:.0f} s (the slowest {tally.slowest:.1f} s); exit codes {codes}")
        for number, found in tally.wrong:
            lines = found.said.strip().splitlines() or ["it said nothing"]
            print(f"  {kind} {number}: {found.code}: {' / '.join(lines)[:400]}")
        num_wrong += len(tally.wrong)
    print(f"{num_wrong} hung, left a traceback, or ended in a code other than 0 and 2")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    if len(sys.argv) > 3:
        kept = Path(tempfile.mkdtemp(prefix="dtmsearch-fuzz-"))
        print(one(sys.argv[2], seed, int(sys.argv[3]), kept), kept)
    else:
        sys.exit(report(COUNTS, seed))
