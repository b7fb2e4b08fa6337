"""A worker whose model is a number: what a request asks for is worth the length of its name."""

import os
import signal
import sys

from autoquant.errors import OutOfMemory, SourceError
from autoquant.measure.evaluator import Measurement
from autoquant.measure.workers.process import serve


def worth(request):
    (group,) = (name for name, _ in request.assignment)
    return Measurement(
        kl=float(len(group)),
        stderr=0.0,
        sequence_kl=(float(len(group)),),
        sequence_tokens=(1,),
        gap=None,
        seconds=float(os.getpid()),
    )


class Toy:
    def measure(self, requests):
        for request in requests:
            name = next(iter(request.assignment))[0]
            if name == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "raise":
                raise SourceError("no such block", fix="none")
            print("a model's own words")
            yield worth(request)


def toy_of(order):
    if order == "too large":
        raise OutOfMemory("it does not fit beside the others", fix="start fewer")
    if order == "dies":
        os._exit(3)
    return Toy()


if __name__ == "__main__":
    serve(int(sys.argv[1]), toy_of)
