"""Ranks on this machine: processes that form one torch.distributed group, do what a module says, and never stay behind.

A rank's work is a module: ``Ranks(2, "package.module")`` starts processes that call its ``main(folder, met)``, which
does its work inside of :func:`effkit.ranks.group.joined`. ``run.json`` in the folder says what to do, in words that the
module knows; ``rank<r>.json`` is what rank r saw.
"""
