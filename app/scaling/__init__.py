"""Computes how many engine replicas a model needs. Pure: the time is passed in.

- ``queueing``: the queueing formulas.
- ``batch``: how much longer a request takes once the replicas are full.
- ``forecast``: arrival rates and their trend.
- ``starts``: how long replicas take from the decision until they serve.
- ``plan``: the decision from one state of the model.
- ``scaler``: decisions over time, with the state kept between them.
- ``report``: the Model's report to the policy.

The policy that Ray Serve calls is ``app.autoscaling``.
"""
