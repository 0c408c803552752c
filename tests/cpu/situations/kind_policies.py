"""Policies and observations: what is put into them, and what their files hold."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cases
import torch
from commands import written
from situation import Situation, gives, holds, refused

from lowbit_attention import RECIPES
from lowbit_attention.adaptive import CallKey, Fingerprint, Observations, Policy, Sensitivity, Subject, choose
from lowbit_attention.errors import InvalidArgumentError

KEY = CallKey("a", 0, 0.0)


def policy(**options: Any) -> Policy:
    """A policy of one call."""
    return Policy(**{"routes": {KEY: "sage2_8b"}, "recipes": {n: RECIPES[n] for n in ("sage2_8b", "exact")}} | options)


@lru_cache(maxsize=1)
def observations() -> Observations:
    """Made-up observations, the same each time; not to be changed."""
    return cases.made_up(layers=2, steps=2)


def reload(kind: Any, damage: Callable[[Any], Any], folder: Path) -> Any:
    """Load what is saved after its document was damaged; `damage` changes it, or returns the file's new text."""
    thing = {Policy: policy, Observations: observations, Sensitivity: effects}[kind]()
    thing.save(folder / "x.json")
    document = json.loads((folder / "x.json").read_text(encoding="utf-8"))
    text = damage(document)
    written(folder, "x.json", text if isinstance(text, str) else json.dumps(document))
    return kind.load(folder / "x.json")


def effects() -> Sensitivity:
    return Sensitivity("layer", {"a": {"sage2_8b": 0.5}}, 0.0)


def damaged(case: str, what: str, kind: Any, damage: Callable[[Any], Any], *words: str) -> Situation:
    return Situation(case, what, partial(reload, kind, damage), refused(InvalidArgumentError, "x.json", *words))


def raises(case: str, what: str, act: Callable[[], Any], *words: str, error: Any = InvalidArgumentError) -> Situation:
    return Situation(case, what, lambda _: act(), refused(error, *words))


def call(**changes: Any) -> Callable[[Any], None]:
    return lambda d: d["calls"][0].update(changes)


def stage(**changes: Any) -> Callable[[Any], None]:
    return lambda d: next(iter(d["distributions"].values()))["q"]["raw"].update(changes)


def deep(document: Any) -> str:
    """A bomb of brackets where a number is due."""
    return json.dumps(document).replace('"index": 0', '"index": ' + "[" * 100_000 + "]" * 100_000)


HUGE = 10**400
ROUTES = [
    raises("T20", "about with NaN", lambda: policy(about={"a": [1, {"b": math.nan}]}), "about['a'][1]['b'] is nan"),
    raises("T20", "about with an object", lambda: policy(about={"a": object()}), "about['a'] is a object"),
    raises("T20+", "about with a key that is no text", lambda: policy(about={"a": {3: 4}}), "has the key 3"),
    raises("T20+", "about that holds itself", lambda: policy(about=_itself()), "nested deeper"),
    raises("T20", "a timestep beyond floats", lambda: policy(routes={CallKey("a", 0, HUGE): "exact"}), "timestep"),
    raises("T20", "a score beyond floats", lambda: policy(scores={KEY: {"exact": HUGE}}), "score"),
    raises("T20+", "an index of Infinity", lambda: policy(routes={CallKey("a", math.inf, 0.0): "exact"}), "index"),  # type: ignore[arg-type]
    raises("T20+", "a key that is a text", lambda: policy(routes={"a": "exact"}), "'a' is no CallKey"),  # type: ignore[dict-item]
    raises(
        "T20+", "a recipe by another name", lambda: policy(recipes={"exact": RECIPES["sage2_8b"]}), "recipes['exact']"
    ),
    *[
        raises("T20", f"Policy.load({bad!r})", partial(Policy.load, bad), *words)
        for bad, words in (
            (None, ["NoneType"]),
            (b"a", ["bytes"]),
            (3, ["int"]),
            ("", ["no file"]),
            ("a\0b", ["no file"]),
        )
    ],
    *[raises("T20", f"policy.save({b!r})", lambda b=b: policy().save(b), "file") for b in (None, b"a", 3, "", "a\0b")],
    raises(
        "T20", "Policy.apply(3)", lambda: policy(model=Fingerprint.of(torch.nn.Linear(1, 1))).apply(3), "model is a int"
    ),  # type: ignore[arg-type]
    raises("T20", "Policy.apply(strict='no')", lambda: policy().apply(strict="no"), "strict"),  # type: ignore[arg-type]
    raises("T20+", "a subject without a model", lambda: Subject("x", None, [1], print), "model is a NoneType"),  # type: ignore[arg-type]
    Situation(
        "T20",
        "a module's name is a lone surrogate",
        lambda f: _through(policy(routes={CallKey("a\ud800", 0, 0.0): "exact"}), f / "p.json").routes,
        gives({CallKey("a\ud800", 0, 0.0): "exact"}),
    ),
    Situation(
        "T20+",
        "a report of one, titled by one",
        lambda f: _report(f / "r.html", "t\udfff", name="b\ud800"),
        holds(lambda text: "t\\udfff" in text and "b\\ud800" in text),
    ),
]


def _itself() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["a"] = loop
    return loop


def _through(thing: Any, path: Path) -> Any:
    thing.save(path)
    return type(thing).load(path)


def _report(path: Path, title: str, **made_up: Any) -> str:
    from lowbit_attention.adaptive import write_report

    write_report(path, choose(cases.made_up(layers=1, steps=1, **made_up), budget=1.0), title=title)
    return path.read_text(encoding="utf-8")


DOCUMENTS = [
    damaged(
        "T33",
        "k_sample of 10⁹ tokens",
        Policy,
        lambda d: d["recipes"][0].update(k_sample="sampled(1000000000)"),
        "count=",
    ),
    damaged("T33", "first_bin of 10¹⁰", Observations, stage(first_bin=10**10), "first_bin"),
    damaged("T33", "an index of 1.9", Policy, call(index=1.9), "index is 1.9"),
    damaged("T33", "a negative count", Observations, call(count=-3), "count is -3"),
    damaged("T33", "scores [2]", Observations, call(scores={n: [2] for n in observations().candidates}), "1 numbers"),
    damaged("T33", "a recipe defined twice", Policy, lambda d: d["recipes"].append(dict(d["recipes"][0])), "twice"),
    damaged(
        "T33+", "a recipe defined twice", Observations, lambda d: d["recipes"].append(dict(d["recipes"][0])), "twice"
    ),
    damaged("T33+", "a call that is there twice", Observations, lambda d: d["calls"].append(d["calls"][0]), "twice"),
    damaged(
        "T33+",
        "a group that is there twice",
        Sensitivity,
        lambda d: d["effects"].append(dict(d["effects"][0])),
        "twice",
    ),
    damaged(
        "T33+", "the same name twice in one object", Policy, lambda d: json.dumps(d)[:-1] + ', "calls": []}', "twice"
    ),
    damaged("T33+", "a negative histogram", Observations, stage(counts=[-1]), "a count is -1"),
    damaged("T33+", "a million channels", Observations, stage(channels=[0.0] * 10**6), "channels"),
    damaged("T33+", "a count that is no integer", Observations, stage(tokens=True), "tokens is True"),
    damaged("T33+", "runs of -1", Observations, lambda d: d.update(runs=-1), "runs is -1"),
    damaged("T33+", "columns in another order", Observations, lambda d: d["columns"].reverse(), "its columns"),
    damaged(
        "T33+", "a negative effect", Sensitivity, lambda d: d["effects"][0].update(sage2_8b=-1), "effect of sage2_8b"
    ),
    damaged("T33+", "a shape too large", Observations, call(shape="1x99999999999x8x8"), "at most"),
    damaged(
        "T20",
        "Infinity as an index",
        Policy,
        lambda d: json.dumps(d).replace('"index": 0', '"index": Infinity'),
        "Infinity",
    ),
    damaged(
        "T20+",
        "1e999 as a timestep",
        Policy,
        lambda d: json.dumps(d).replace('"timestep": 0.0', '"timestep": 1e999'),
        "inf",
    ),
    damaged("T20+", "400 digits as a score", Policy, call(scores={"a": HUGE}), "score of a is an integer"),
    damaged(
        "T20+",
        "5000 digits as an index",
        Policy,
        lambda d: json.dumps(d).replace('"index": 0', '"index": ' + "9" * 5000),
        "digits",
    ),
    damaged("T20+", "a text as a recipe", Policy, lambda d: d.update(recipes=["sage2_8b"]), "a recipe is"),
    damaged("T20+", "a list as about", Policy, lambda d: d.update(about=[1]), "about is"),
    damaged("T20", "brackets without end in a policy", Policy, deep, "nested"),
    damaged("T20+", "brackets without end in observations", Observations, deep, "nested"),
    damaged(
        "T20+", "brackets less deep than Python's own limit", Policy, lambda d: d.update(about=_nested(300)), "nested"
    ),
    Situation(
        "T20+",
        "a file of absurd size",
        lambda f: Policy.load(_sparse(f / "p.json")),
        refused(InvalidArgumentError, "bytes"),
    ),
    Situation(
        "T20+", "a pipe", lambda f: Policy.load(_pipe(f / "p.json")), refused(InvalidArgumentError, "no regular file")
    ),
    raises("T20+", "a device without end", lambda: Observations.load("/dev/zero"), "no regular file"),
    Situation("T20+", "a folder", Policy.load, refused(InvalidArgumentError, "no regular file")),
    Situation(
        "T20+",
        "a file that is no UTF-8",
        lambda f: Policy.load(written(f, "p", b'{"a": "\xff"}')),
        refused(InvalidArgumentError, "no JSON"),
    ),
    Situation(
        "T23+",
        "a recipe that gave NaN: null in the file, and the worst there is when it is read",
        lambda f: _nan_scores(f / "o.json"),
        gives((True, [math.inf, -math.inf])),
    ),
    Situation(
        "T20+",
        "an integer written as 0.0",
        lambda f: reload(Policy, call(index=0.0), f).routes,
        gives({KEY: "sage2_8b"}),
    ),
]


def _nested(depth: int) -> dict[str, Any]:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return {"a": inner}


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _nan_scores(path: Path) -> tuple[bool, list[float]]:
    seen = copy.deepcopy(observations())
    score = next(iter(seen.records.values())).scores["sage2_4b"]
    score.l1 = score.score = math.nan
    seen.save(path)
    strict = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest_fail(word))
    again = next(iter(Observations.load(path).records.values())).scores["sage2_4b"]
    return strict is not None, [again.l1, again.score]


def pytest_fail(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


SITUATIONS = [*ROUTES, *DOCUMENTS]
