"""Ages of messages, by clocks that differ."""

from __future__ import annotations

import pytest

from moescope_service.collector.clocks import SenderClock


def test_on_one_machine_an_age_is_a_difference():
    clock = SenderClock(is_ours=True)
    assert [clock.age_s(10.0, now_s) for now_s in (10.5, 10.25, 9.0)] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_of_another_clock_it_is_what_is_beyond_the_fastest(ahead_s):
    clock = SenderClock(is_ours=False)
    sent = [(100.0, 100.5), (101.0, 101.25), (102.0, 105.25)]
    ages = [clock.age_s(sent_s + ahead_s, now_s) for sent_s, now_s in sent]
    assert ages == [0.0, 0.0, 3.0]
