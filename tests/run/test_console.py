"""Progress where there is no terminal."""

import re

from bpt_rl.run import console
from bpt_rl.run.console import Stages


def test_without_a_terminal_a_stage_says_from_time_to_time_how_far_it_is(monkeypatch, capsys):
    with Stages(2) as stages, stages.stage("cells") as advance:
        advance(1, 72)
        monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
        advance(20.4, 72, note="at_n4 [trains] " + 200 * "x")
        monkeypatch.setattr(console, "LINE_SECONDS", 60.0)
        advance(30, 72)
    err = capsys.readouterr().err
    said = (
        r"1/2 cells \.\.\.\n1/2 cells: 20 of 72 after \d+ s \(at_n4 \[trains\] x{200}\)\n"
        r"1/2 cells: done in \d+ s\n"
    )
    assert re.fullmatch(said, err), err
