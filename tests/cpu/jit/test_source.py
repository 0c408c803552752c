"""A source knows everything it includes."""

import pytest

from lowbit_attention import InvalidArgumentError
from lowbit_attention.backends.cuda.jit.source import read_source


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_headers_are_found_directly_and_indirectly_each_once(tmp_path):
    write(
        tmp_path,
        {
            "kernels/a.cu": '#include "ptx/x.cuh"\n  #  include "tile/y.cuh"\n#include <a.h>\n// #include "n.cuh"\n',
            "ptx/x.cuh": '#include "tile/y.cuh"\n',
            "tile/y.cuh": '#include "ptx/x.cuh"\nint y;\n',  # in a circle
        },
    )
    source = read_source(tmp_path, "kernels/a.cu")
    assert [name for name, _ in source.headers] == ["ptx/x.cuh", "tile/y.cuh"]
    assert dict(source.headers)["tile/y.cuh"].endswith("int y;\n")


def test_a_missing_header_names_the_line_that_asks_for_it(tmp_path):
    write(tmp_path, {"a.cu": 'int a;\n#include "b.cuh"\n', "b.cuh": '\n\n#include "gone.cuh"\n'})
    with pytest.raises(InvalidArgumentError, match=r"gone\.cuh \(included at b\.cuh:3\)"):
        read_source(tmp_path, "a.cu")
