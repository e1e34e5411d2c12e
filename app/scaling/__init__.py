"""How many engine replicas a model ought to have. Pure: values in, values out, the time passed in.

``queueing`` has the formulas, ``forecast`` the rates, ``starts`` what it takes until a replica
that was ordered serves. ``plan`` decides from one state of the
model, ``scaler`` remembers what must be remembered between decisions, and ``report`` is how the
Model tells the policy. The policy that Ray Serve calls is ``app.autoscaling``.
"""
