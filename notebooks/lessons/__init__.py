"""What only the lessons run: recounts of published figures, demonstrations and the mini-labs.

A notebook's folder is on its kernel's path: ``from lessons import ...`` works there.
"""
