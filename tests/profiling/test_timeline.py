"""Time by stage, with a clock that tests turn by hand, and a device that is behind."""

from topd.profiling.timeline import HostClock, Timeline


class LateClock(HostClock):
    """A clock at which the device has come to `reached`, while the host goes on."""

    def __init__(self):
        self.moment, self.reached, self.waits = 0.0, 0.0, 0

    def now(self):
        return self.moment

    def passed(self, stamp):
        return stamp <= self.reached

    def wait(self):
        self.waits += 1
        self.reached = self.moment


def test_stages_add_up_to_the_whole():
    clock = LateClock()
    timeline = Timeline(clock)
    for stage, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        timeline.switch(stage)
        clock.moment += seconds
    timeline.close()
    assert timeline.seconds == {"a": 5.0, "b": 2.0}
    assert clock.waits == 1


def test_nothing_waits_for_a_device_that_is_behind():
    clock = LateClock()
    timeline = Timeline(clock)
    for stage in "abc":
        timeline.switch(stage)
        clock.moment += 1.0
    clock.reached = 1.0  # the end of a, the beginning of b
    timeline.settle()
    assert (timeline.seconds, clock.waits) == ({"a": 1.0, "b": 0.0, "c": 0.0}, 0)
    timeline.close()
    assert timeline.seconds == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_a_timeline_of_nothing_closes():
    timeline = Timeline(LateClock())
    timeline.close()
    assert timeline.seconds == {}
