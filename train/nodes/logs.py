"""What each process writes: runs/NAME/logs/TIME/rank_NNNNN.out and .err; the console is the first process's."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

TAIL_LINES = 30


class RankLogs(LogsSpecs):
    """Files for each worker of this node, by their ranks in the job.

    Args:
        directory: where they lie; made if need be.
        errors: a directory of this node alone, for what workers tell their starter.
    """

    def __init__(self, directory: Path, errors: Path) -> None:
        super().__init__(str(directory))
        self.directory, self._errors = directory, errors

    def file(self, rank: int, ending: str) -> Path:
        """A worker's standard output (out) or error (err)."""
        return self.directory / f"rank_{rank:05d}.{ending}"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by the agent with the variables of each local worker."""
        self.directory.mkdir(parents=True, exist_ok=True)
        out, err, errors = {}, {}, {}
        for local, variables in envs.items():
            rank = int(variables["RANK"])
            out[local], err[local] = str(self.file(rank, "out")), str(self.file(rank, "err"))
            errors[local] = str(self._errors / f"{rank}.json")
            variables["TORCHELASTIC_ERROR_FILE"] = errors[local]
        first = [local for local, variables in envs.items() if variables["RANK"] == "0"]
        shown_out, shown_err = {local: out[local] for local in first}, {local: err[local] for local in first}
        nowhere = str(self._errors / "filtered")
        return LogsDest(out, err, shown_out, shown_err, errors, nowhere, nowhere)

    def has_errors(self) -> bool:
        """Whether a worker has left its exception."""
        return any(self._errors.glob("*.json"))

    @property
    def root_log_dir(self) -> str:
        """The directory, as the agent asks for it."""
        return str(self.directory)

    def tail(self, rank: int) -> list[str]:
        """The last lines that a worker has written to its standard error."""
        try:
            text = self.file(rank, "err").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return text.splitlines()[-TAIL_LINES:]
