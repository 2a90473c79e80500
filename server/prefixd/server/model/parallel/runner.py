"""The runner of rank 0: has every rank run each step, and makes one outcome of theirs."""

from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.parallel.followers import Followers
from prefixd.server.model.parallel.outcome import Outcome, raise_failures
from prefixd.server.model.runner import Runner


class ParallelRunner(BlockingRunner):
    """A ModelRunner over the runners of all ranks. Used by one thread."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        """``runner`` is the one of this rank."""
        self._runner = runner
        self._followers = followers

    @property
    def decoder(self) -> Decoder:
        """That of this rank."""
        return self._runner.decoder

    def run(self, step: Step) -> StepOutput:
        """As of a ModelRunner. A step that fails on any rank fails; raises RankLost too."""
        step.join_masks()  # the other ranks sample too
        number = self._followers.run("run", step)
        try:
            output = self._runner.run(step)
        except Exception as error:
            self._followers.end(number, Outcome.of(error))
            raise
        raise_failures(self._followers.end(number, Outcome.of(output)))
        return output
