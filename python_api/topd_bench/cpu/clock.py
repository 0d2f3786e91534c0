"""Wall time and page faults of a call on a CPU."""

import resource
import time

from topd_bench.timing import Contender, Sample


class WallClock:
    """The clock of `topd_bench.timing` for what runs in this process."""

    def sample(self, run: Contender) -> Sample:
        """Time one call; its result is freed after the clock has stopped."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        result = run()
        time_ms = (time.perf_counter() - start) * 1e3
        sample = Sample(time_ms, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        del result
        return sample
