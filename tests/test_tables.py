"""Tables: numbers right and with even decimals, sentences left, nothing cut or escaped unseen."""

import pandas as pd
import pytest

from onn_workbench.tables import Table, cut, formatted, frame


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1234, 5], ["1,234", "5"]),
        ([14.592, 0.3, None], ["14.592", "0.300", ""]),
        ([1 / 3, 20.0], ["0.33", "20.00"]),
        ([1e-5, 0.1], ["1e-05", "0.1"]),
        ([float("inf"), 2.5], ["inf", "2.5"]),
        (["a\nb  c", True], ["a b c", "yes"]),
    ],
)
def test_a_column_has_one_form(values, texts):
    table = formatted(pd.DataFrame({"x": pd.Series(values, dtype=object)}))
    assert [row[0] for row in table] == ["x", *texts]


def test_numbers_are_right_and_sentences_left_in_both_directions():
    rows = [{"run": "a", "loss": "1.0 ± 0.2", "end": "it <b> ended"}, {"run": "b", "loss": "2"}]
    made = frame(rows, "run")
    html = Table(made)._repr_html_()
    assert 'text-align: right; white-space: nowrap; vertical-align: top">1.0 ± 0.2</td>' in html
    assert 'text-align: left; vertical-align: top">it &lt;b&gt; ended</td>' in html
    assert "NaN" not in html and "nan" not in html
    across = Table(made, across=True)
    assert formatted(made, True)[1] == ["loss", "1.0 ± 0.2", "2"]
    assert 'nowrap; vertical-align: top">2</td>' in across._repr_html_()
    assert 'text-align: left; vertical-align: top">it &lt;b&gt; ended</td>' in across._repr_html_()
    assert "1.0 ± 0.2" in repr(across)


def test_a_cut_answer_says_so():
    assert cut("Yes.\nI am", True) == "Yes. I am…" and cut("Yes.", False) == "Yes."
