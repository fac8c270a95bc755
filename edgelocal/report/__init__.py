"""What a run reached and measured: on the terminal, as one JSON object, and as one page to read offline.

load      run folder -> plain values (the object that --json prints)
model     plain values -> dataclasses, tolerant of what older runs lack
words     numbers and comparisons in words
terminal  tables for the terminal
page      the page, from charts (memory, timeline, curves, times, frontier), axes, svg and style
"""
