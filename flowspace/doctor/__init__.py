"""What this machine can do, and what a model of one's own needs: ``flowspace doctor``.

* `libraries`: which library is installed, and which extra brings the one that is not.
* `machine`: versions, device, attention kernels, torch.compile.
* `target`: a model and a batch from text like ``my_file:build``.
* `examination`: the error and the cost of each route to D_t f on that model, and its advice.
* `compiled`: the same steps under torch.compile, in a process of its own.
* `page`: what was found, as text.

Nothing is imported before it is asked for: the command line answers without torch.
"""
