"""Tests of CLIP2FL; the packages mirror those of the program."""
