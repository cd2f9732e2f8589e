"""The README's quick start runs, and does what it says."""

import re
from pathlib import Path
from types import FunctionType

import cheapertraining

README = Path(__file__).parents[1] / "README.md"


def test_the_quick_start(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    weights = eval(capsys.readouterr().out)
    assert weights == names["optimizer"].weights == names["mixed"].weights
    assert weights["noise"] < 0.2
    assert set(names["checkpoint"]["optimizer"]) == {"state", "param_groups", "influence"}


def test_every_public_name_is_documented():
    public = [getattr(cheapertraining, name) for name in cheapertraining.__all__]
    classes_and_functions = [value for value in public if isinstance(value, type | FunctionType)]
    assert len(classes_and_functions) >= 14
    assert [value.__name__ for value in classes_and_functions if not value.__doc__] == []
