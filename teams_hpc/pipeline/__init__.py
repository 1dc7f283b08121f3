"""The stage graph: what runs after what, what is done already, and running it on this machine.

Stages meet only through files in the run directory. A stage is done when its manifest is there and
was made from today's inputs. Imports nothing heavy: stage code is loaded in the stage's process.
"""
