"""A model in lm-eval's place that answers by a function of the request."""


def answering(answer):
    """The model. Its `answer` may be exchanged; `requests` has what it was asked, in order."""
    from lm_eval.api.model import LM

    class Answering(LM):
        def __init__(self):
            super().__init__()
            self.answer, self.requests = answer, []

        def generate_until(self, requests):
            self.requests += requests
            return [self.answer(request) for request in requests]

        loglikelihood = loglikelihood_rolling = generate_until

    return Answering()
