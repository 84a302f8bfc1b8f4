import pytest

from bpt_rl.run import report_numbers
from bpt_rl.run.protocols import Estimate

NUMBER = {
    "value": 1.0,
    "low": 0.5,
    "high": 1.5,
    "protocol": "mean",
    "subset": "first-5",
    "num_seeds": 1,
    "num_chains": 3,
    "num_episodes": 2,
    "interval": "chains",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": " "}, "must name its protocol"),
        ({"subset": ""}, "must name its subset"),
        ({"num_seeds": 0}, "must give its num_seeds; got 0"),
        ({"num_chains": 0}, "must give its num_chains; got 0"),
        ({"num_episodes": 0, "interval": "exact"}, "must give its num_episodes; got 0"),
        ({"low": float("nan")}, "must have ordered bounds"),
        ({"low": 2.0}, "must have ordered bounds"),
        ({"interval": "one sample"}, "must have ordered bounds"),
        ({"value": float("nan")}, "must be finite"),
    ],
)
def test_number_without_its_provenance_is_refused(change, message):
    report_numbers.ReportedNumber(**NUMBER)
    with pytest.raises(ValueError, match=message):
        report_numbers.ReportedNumber(**{**NUMBER, **change})


def test_estimate_becomes_a_reported_number_with_its_interval():
    size = {"subset": "first-5", "num_seeds": 1, "num_chains": 3, "num_episodes": 2}
    number = report_numbers.reported(Estimate(1234.5, 1000.0, 1500.25, 3, "last"), **size)
    assert number.text == "1,234 [1,000, 1,500]"
    nan = float("nan")
    assert report_numbers.reported(Estimate(-0.5, nan, nan, 1, "last"), **size).interval == "one sample"


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.0, True, "0.00"),
        (-0.001, False, "0.00"),
        (3.14159, True, "+3.14"),
        (-25.04, False, "\N{MINUS SIGN}25.0"),
        (9.96, False, "10.0"),
        (1000, False, "1,000"),
    ],
)
def test_returns_are_written_with_three_digits(value, signed, text):
    assert report_numbers.format_return(value, signed) == text
