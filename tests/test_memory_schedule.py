"""Checkpointing schedules: exact counts against a search over all orders, and what every schedule promises."""

from __future__ import annotations

import functools
import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm.compiler import schedule
from tinygrad_lstm.compiler.schedule import Advance, Schedule, make_schedule


def fewest_steps(steps: int, residual: int, carry: int, budget: int) -> int | None:
    """The fewest steps run forward by any order of keeping, dropping and running: a search over all states."""
    start = (frozenset[int](), steps)  # kept carries besides the first; steps that are not reversed yet
    best = {start: 0}
    queue = [(0, 0, start)]
    tie = 0
    while queue:
        cost, _, (held, left) = heapq.heappop(queue)
        if left == 0:
            return cost
        if best[held, left] < cost:
            continue
        moves = []
        for at in (0, *held):
            if at < left and len(held) * carry + (left - at) * residual <= budget:
                moves.append((left - at, (frozenset(h for h in held if h < at), at)))
            moves += [(to - at, (held | {to}, left)) for to in range(at + 1, left) if to not in held]
            moves += [(0, (held - {at}, left))] if at else []
        for more, state in moves:
            if len(state[0]) * carry <= budget and cost + more < best.get(state, 1 << 30):
                best[state] = cost + more
                tie += 1
                heapq.heappush(queue, (cost + more, tie, state))
    return None


def checked(plan: Schedule, budget: int) -> Schedule:
    """Follow a schedule on a stack of positions; check what it says of itself."""
    stack, left, ran, peak, kept = [0], plan.steps, 0, 0, 0
    for action in plan.actions:
        pieces = plan.pieces(action)
        assert [a for a, _ in pieces] == [action.start, *(b for _, b in pieces[:-1])]
        assert pieces[-1][1] == action.stop
        assert max(b - a for a, b in pieces) <= plan.longest
        ran += action.stop - action.start
        assert stack[-1] == action.start < action.stop
        if isinstance(action, Advance):
            stack.append(action.stop)
        else:
            assert action.stop == left
            peak = max(peak, (len(stack) - 1) * plan.carry + (action.stop - action.start) * plan.residual)
            left = stack.pop()
        kept = max(kept, len(stack) - 1)
    assert (left, stack, plan.recomputed, plan.peak) == (0, [], ran - plan.steps, peak)
    assert plan.kept == max(kept, 0)
    assert peak <= budget
    return plan


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize(("residual", "carry"), [(7, 2), (1, 1), (2, 3), (1, 4), (3, 1)])
def test_no_schedule_is_better_by_brute_force(steps, residual, carry):
    for budget in range(1, steps * residual + 1):
        best = fewest_steps(steps, residual, carry, budget)
        if best is None:
            with pytest.raises(tg.ArgumentError, match="do not suffice"):
                make_schedule(steps, residual, carry, budget)
            continue
        plan = checked(make_schedule(steps, residual, carry, budget), budget)
        assert plan.steps + plan.recomputed <= best + (plan.segments - 1) * carry / residual + 1
        choose = schedule._optimal(steps, 1, residual, carry, budget) if residual + carry <= budget else None
        if choose is not None:
            exact = checked(Schedule(steps, residual, carry, schedule._walk(steps, choose)), budget)
            assert exact.steps + exact.recomputed == best
        if schedule._equal_segments(steps, residual, carry, budget) == 0:
            assert plan.steps + plan.recomputed == best


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 40), st.floats(0.005, 1.0))
def test_schedules_keep_their_promises(steps, residual, carry, fraction):
    budget = max(1, int(fraction * steps * residual))
    try:
        plan = make_schedule(steps, residual, carry, budget)
    except tg.ArgumentError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert budget < least == min(residual + carry, steps * residual)
        plan, budget = make_schedule(steps, residual, carry, least), least
    checked(plan, budget)
    assert plan.recomputed >= steps - budget // residual  # every step without residuals runs again


def test_one_recomputation_has_segments_of_about_the_square_root():
    least = next(b for b in range(1, 10_000) if schedule._equal_segments(1000, 7, 2, b))
    plan = checked(make_schedule(1000, 7, 2, least), least)
    assert plan.longest == round((1000 * 2 / 7) ** 0.5)
    assert plan.recomputed == 1000 - plan.longest
    below = checked(make_schedule(1000, 7, 2, least - 1), least - 1)  # segments grow as carries are given back
    assert len({action.stop - action.start for action in below.actions}) > 2


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [2, 7, 10, 20, 35])
def test_one_step_per_reversal_is_the_binomial_schedule(slots, steps):
    # Griewank & Walther 2000: r * l - binom(s + r, r - 1) advances, r the least with l <= binom(s + r, s).
    runs = next(r for r in range(1, 99) if steps <= math.comb(slots + r, slots))
    budget = 100 + slots * 19
    if (steps - 1) * 19 + 100 <= budget:
        return  # one recomputation fits
    plan = checked(make_schedule(steps, 100, 19, budget), budget)
    assert plan.longest == 1
    assert plan.recomputed == runs * steps - math.comb(slots + runs, runs - 1)


@pytest.mark.parametrize("budget", [45, 90, 180])
def test_the_grid_costs_little(budget, monkeypatch):
    on_grid = make_schedule(1025, 7, 2, budget).recomputed
    monkeypatch.setattr(schedule, "EXACT", 1025)
    schedule._schedule.cache_clear()
    exact = make_schedule(1025, 7, 2, budget).recomputed
    schedule._schedule.cache_clear()
    assert exact <= on_grid <= 1.05 * exact


@pytest.mark.parametrize("steps", [8, 12, 24, 60])
def test_the_best_schedule_on_a_grid(steps, monkeypatch):
    monkeypatch.setattr(schedule, "EXACT", 4)
    schedule._schedule.cache_clear()
    cell = -(-steps // 4)

    for budget in range(11, 45):

        @functools.cache
        def cost(n: int, held: int, budget: int = budget) -> float:
            if n * 7 <= budget - held * 3:
                return n
            if (held + 1) * 3 + 7 > budget:
                return math.inf
            return min(k + cost(n - k, held + 1) + cost(k, held) for k in range(1, n) if n <= cell or k % cell == 0)

        if cost(steps, 0) < math.inf and not schedule._equal_segments(steps, 7, 3, budget):
            plan = checked(make_schedule(steps, 7, 3, budget), budget)
            assert plan.steps + plan.recomputed == cost(steps, 0)
    schedule._schedule.cache_clear()


@pytest.mark.parametrize("steps", [1025, 2500, 3000, 4096])
def test_long_loops_are_scheduled_on_a_grid(steps):
    for budget in (7 + 3 * 2, 25, 37, 50, 61, 90, 120):
        checked(make_schedule(steps, 7, 2, budget), budget)
    with pytest.raises(tg.ArgumentError, match="at least 11 are needed"):
        make_schedule(steps, 7, 2, 8)


def test_a_schedule_without_carries_or_residuals():
    assert checked(make_schedule(10, 5, 0, 5), 5).recomputed == 9
    assert make_schedule(10, 0, 4, 0).recomputed == 0
    assert make_schedule(0, 5, 4, 0).peak == 0
    assert str(make_schedule(3, 5, 4, 15)) == "3 steps in one: keeps everything, 15 bytes"
