"""Decisions over time: growing at once, looking ahead, going down late, sleeping."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.forecast import CountedDemand, forecast, sudden, window_for
from app.scaling.report import PoolReport, ScalingReport, TierReport
from app.scaling.scaler import ReplicaBounds, Scaler

pytestmark = pytest.mark.unit

SETTINGS = ScalingSettings()
SERVICE_S = 10.0


class Life:
    """A model over time: so many requests a second come, and as many finish."""

    def __init__(self, *, start_s=10.0, least=0, most=50, replicas=1, **settings):
        self.scaler, self.settings = Scaler(), SETTINGS.model_copy(update=settings)
        self.now, self.replicas = 1000.0, replicas
        self.least, self.most, self.start_s = least, most, start_s
        self.arrived = dict.fromkeys(Tier, 0.0)

    def go(self, seconds, *, waiting=None, ready=0, **rates):
        """Let time pass, and return the targets second by second."""
        targets = []
        for _ in range(int(seconds)):
            self.now += 1.0
            tiers = {}
            for tier in Tier:
                rate = rates.get(tier.value, 0.0)
                self.arrived[tier] += rate
                count = self.arrived[tier]
                tiers[tier] = TierReport(
                    waiting=(waiting or {}).get(tier.value, 0),
                    running=round(rate * SERVICE_S),
                    arrived=count,
                    finished=count,
                    served_s=count * SERVICE_S,
                )
            report = ScalingReport(
                tiers, {"pool": PoolReport(8, ready, start_s=self.start_s)}, settings=self.settings
            )
            bounds = ReplicaBounds(self.replicas, self.least, self.most)
            decision = self.scaler.decide(report, {"pool": bounds}, self.now)
            self.why, self.expected_s = decision.why, decision.start_s
            self.replicas = decision.replicas["pool"]
            targets.append(self.replicas)
        return targets


def test_a_burst_of_priority_counts_within_seconds():
    life = Life(start_s=600.0)
    life.go(900, priority=0.4)
    calm = life.replicas
    assert max(life.go(7, priority=8.0)) >= 4 * calm


def test_default_is_smoothed():
    life = Life()
    life.go(300, default=0.5)
    assert max(life.go(5, default=8.0)) <= 3
    assert max(life.go(120, default=8.0)) >= 10


def test_a_replica_is_stopped_only_after_a_while_without_use():
    life = Life()
    life.go(300, default=3.0)
    busy = life.replicas
    assert busy >= 4
    after = SETTINGS.scale_down_after_s
    assert min(life.go(after, default=0.3)) == busy
    assert min(life.go(2 * SETTINGS.smoothing_s + 5, default=0.3)) < busy


def test_where_engines_start_slowly_it_waits_as_long():
    life = Life(start_s=600.0)
    life.go(1300, default=3.0)
    busy = life.replicas
    assert min(life.go(600, default=0.3)) == busy
    assert min(life.go(700, default=0.3)) < busy


def test_nothing_is_stopped_by_somebody_who_has_just_come():
    life = Life(replicas=20)
    assert min(life.go(299, default=0.3)) == 20
    assert min(life.go(20, default=0.3)) < 20
    life = Life(replicas=20, start_s=400.0)
    assert min(life.go(399, default=0.3)) == 20


def test_a_half_empty_fleet_is_not_taken_to_carry_twice_its_load():
    """Where a full replica is three times as slow as an idle one."""
    sizes = {}
    for growth in (0.0, 2.0):
        scaler, target, finished, served_s, arrived = Scaler(), 20, 0.0, 0.0, 0.0
        tiers = {tier: TierReport() for tier in Tier}
        for second in range(2400):
            slots = 8.0 * target
            # What runs follows from how many come and how slow a step is.
            running, rate = 0.0, 8.0 + 4.0 * math.sin(second / 200)
            for _ in range(30):
                running = min(slots, rate * 5.0 * (1 + growth * running / slots))
            done = running / (5.0 * (1 + growth * running / slots))
            arrived, finished, served_s = arrived + rate, finished + done, served_s + running
            tiers[Tier.DEFAULT] = TierReport(0, running, 0.0, arrived, finished, served_s)
            report = ScalingReport(tiers, {"pool": PoolReport(8, target)}, 0.0)
            bounds = {"pool": ReplicaBounds(target, 1, 50)}
            target = scaler.decide(report, bounds, float(second)).replicas["pool"]
        sizes[growth] = target
    assert sizes[2.0] > 1.5 * sizes[0.0]


def test_nothing_is_stopped_while_priority_waits():
    life = Life()
    life.go(300, default=3.0)
    busy = life.replicas
    assert min(life.go(1000, waiting={"priority": 1}, default=0.1)) >= busy


def test_it_sleeps_only_once_nobody_has_asked_for_long():
    life = Life()
    life.go(300, default=0.2)
    assert min(life.go(SETTINGS.sleep_after_s)) == 1
    assert life.go(SETTINGS.scale_down_after_s + 5)[-1] == 0
    assert "nobody asks" in life.why
    assert life.go(1, waiting={"flex": 1}) == [1]


def test_it_does_not_sleep_below_its_least():
    life = Life(least=1)
    assert min(life.go(3000)) == 1


def test_a_rise_is_looked_ahead():
    targets = {}
    for start_s in (10.0, 300.0):
        life = Life(start_s=start_s)
        for step in range(100):
            targets[start_s] = life.go(30, default=1.0 + step / 20)[-1]
    assert targets[300.0] > targets[10.0]


def test_it_looks_ahead_by_the_wait_for_a_node_too():
    targets = []
    for waited_s in (0, 600):
        life = Life(start_s=10.0, least=1)
        life.go(10, ready=1, default=0.1)
        # One replica more, which is ready after ten seconds, or once a node has come up.
        life.go(10 + waited_s, ready=1, waiting={"priority": 8}, default=0.1)
        life.go(900, ready=2, default=0.1)
        assert life.expected_s == pytest.approx(10.0 + waited_s, abs=1.0)
        for step in range(100):
            targets_of = life.go(30, ready=2, default=1.0 + step / 20)
        targets.append(targets_of[-1])
    assert targets[1] > targets[0]


@trying(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.floats(0, 10),
            st.floats(0, 10),
            st.floats(0, 10),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.integers(0, 3),
    st.integers(3, 9),
)
def test_whatever_happens_bounds_hold_and_priority_that_waits_loses_nothing(steps, least, most):
    life = Life(least=least, most=most, replicas=most, scale_down_after_s=5, sleep_after_s=10)
    for seconds, priority, default, flex, waiting, restart in steps:
        if restart:
            life.scaler = Scaler()
        before = life.replicas
        targets = life.go(
            seconds, waiting={"priority": waiting}, priority=priority, default=default, flex=flex
        )
        assert all(least <= target <= most for target in targets)
        if waiting:
            assert targets == sorted(targets) and targets[0] >= before


def test_pools_that_the_model_does_not_know_stay_as_they_are():
    report = ScalingReport({tier: TierReport() for tier in Tier}, {})
    decided = Scaler().decide(report, {"new": ReplicaBounds(3, 0, 5)}, 0.0)
    assert decided.replicas == {"new": 3}


def test_a_pool_of_fixed_size_serves_all_the_same():
    tiers = {tier: TierReport() for tier in Tier}
    tiers[Tier.DEFAULT] = TierReport(running=12)
    decided = [
        Scaler().decide(
            ScalingReport(tiers, {"scaled": PoolReport(8), "fixed": PoolReport(8, ready=ready)}),
            {"scaled": ReplicaBounds(0, 0, 9)},
            0.0,
        )
        for ready in (0, 1, 3)
    ]
    assert [one.replicas for one in decided] == [{"scaled": 2}, {"scaled": 1}, {"scaled": 0}]


def test_what_priority_needed_is_kept_where_engines_start_slowly():
    for start_s, kept in ((600.0, True), (10.0, False)):
        life = Life(start_s=start_s)
        life.go(700, priority=0.2, default=0.2)
        calm = life.replicas
        burst = max(life.go(120, priority=3.0, default=0.2))
        assert burst > 2 * calm
        assert (life.go(1800, priority=0.2, default=0.2)[-1] >= burst * 0.7) is kept


def test_a_tier_of_which_few_have_finished_is_taken_to_be_like_the_others():
    tiers = {tier: TierReport() for tier in Tier}
    scaler, replicas = Scaler(), []
    for second in range(400):
        done = 0.2 * second
        tiers[Tier.DEFAULT] = TierReport(0, 2, 0.0, done, done, 10 * done)
        # One of priority has come and goes on.
        tiers[Tier.PRIORITY] = TierReport(running=1, arrived=1)
        report = ScalingReport(tiers, {"pool": PoolReport(8, 2)})
        bounds = {"pool": ReplicaBounds(replicas[-1] if replicas else 2, 0, 9)}
        replicas.append(scaler.decide(report, bounds, float(second)).replicas["pool"])
    # By itself it would be a load of one, for which eight slots are too few.
    assert replicas[-1] == 1


def test_what_priority_needed_does_not_keep_a_model_from_sleeping():
    life = Life(start_s=600.0)
    life.go(700, priority=1.0)
    assert life.go(SETTINGS.sleep_after_s + 605)[-1] == 0


@given(st.floats(0.1, 50), st.floats(10, 300), st.floats(0, 600))
def test_a_steady_rate_is_forecast_as_it_is(rate, window_s, ahead_s):
    counted = CountedDemand(3 * window_s)
    for second in range(int(3 * window_s) + 10):
        counted.add(second, rate * second)
    now = second
    found = forecast(counted, now, window_s=window_s, ahead_s=ahead_s)
    assert found == pytest.approx(rate, rel=0.02)
    assert sudden(counted, now, window_s=window_s) <= rate + 1e-9


def counted(*steps):
    """What was counted where rates a second held for some seconds each, and when that ended."""
    counted, now, count = CountedDemand(3600), 0.0, 0.0
    for seconds, rate in steps:
        for _ in range(seconds):
            counted.add(now, math.floor(count))
            now, count = now + 1, count + rate
    return counted, now


def test_few_arrivals_are_measured_over_long_and_not_beyond_where_their_rate_changed():
    bounds = {"least_s": 60.0, "most_s": 1200.0}
    assert window_for(*counted((3000, 0.02)), **bounds) == 1200.0
    assert window_for(*counted((3000, 1.0)), **bounds) < 120.0
    # A burst that has been over for as long as it lasted does not count any more.
    fell, now = counted((3000, 0.004), (600, 0.04), (600, 0.004))
    window_s = window_for(fell, now, **bounds)
    assert window_s <= 600
    assert forecast(fell, now, window_s=window_s, ahead_s=10.0) < 0.02
    rose, now = counted((3000, 0.004), (600, 0.04))
    window_s = window_for(rose, now, **bounds)
    assert forecast(rose, now, window_s=window_s, ahead_s=10.0) > 0.03


def test_chance_hardly_ever_looks_like_a_change():
    # The window in which 64 come, or all of the longest.
    for rate, enough_s in ((0.005, 1200.0), (0.02, 1200.0), (0.2, 64 / 0.2 / 1.2**2)):
        cut = []
        for seed in range(4):
            random, counted, count = Random(seed), CountedDemand(3600), 0
            for now in range(8000):
                count += random.random() < rate
                counted.add(float(now), count)
                if now > 3000 and now % 10 == 0:
                    window_s = window_for(counted, float(now), least_s=60.0, most_s=1200.0)
                    cut.append(window_s < enough_s)
        assert sum(cut) < 0.03 * len(cut)


def test_a_burst_that_is_over_is_noticed_the_sooner_the_longer_it_was():
    noticed = []
    for burst_s in (120, 600):
        steps = ((3000, 0.01), (burst_s, 0.1))
        noticed.append(
            next(
                after
                for after in range(30, 1200, 10)
                if window_for(*counted(*steps, (after, 0.01)), least_s=60.0, most_s=1200.0)
                <= 1.2 * after
            )
        )
    assert noticed[1] <= 120 and noticed[1] <= noticed[0]


def test_where_little_is_known_a_rate_is_measured_over_all_of_it():
    short, now = counted((100, 0.05))
    assert forecast(
        short, now, window_s=window_for(short, now, least_s=60.0, most_s=1200.0), ahead_s=0.0
    ) == pytest.approx(0.05, rel=0.25)


def test_reports_survive_the_way_as_numbers():
    tiers = {tier: TierReport(1, 2, 3.5, 4, 5, 6.5) for tier in Tier}
    pools = {"a.b-c": PoolReport(8, 2, 0, 1.5, 30), "d": PoolReport(4)}
    settings = ScalingSettings(flex_replicas=3, smoothing_s=7)
    report = ScalingReport(tiers, pools, 0.2, settings)
    assert ScalingReport.from_metrics(report.to_metrics()) == report
    assert ScalingReport.from_metrics({"headroom": 0.1}) is None
