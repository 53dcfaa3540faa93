"""From what a deadline grows."""

from __future__ import annotations

from moe_evo.gangs.dispatcher import Dispatcher, Job
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation


def test_the_longest_time_is_that_of_jobs_on_the_same_examples() -> None:
    genome = Genome.from_kept([[0, 1]], 4, 1)
    search, test = Job("work", "search", genome), Job("work", "test", genome)
    dispatcher = Dispatcher(max_batch=4, max_attempts=3)
    dispatcher.join("run")
    dispatcher.submit("run", [(0, search), (1, test)])
    assert dispatcher.take(1) == (search,)
    dispatcher.finish((search,), [Evaluation(0.5)], 2.0)
    assert dispatcher.longest_s((search,)) == 2.0
    assert dispatcher.longest_s((test,)) is None  # a split of thousands takes longer, and does not hang
