"""Reads finished runs; trains nothing."""

from cvfp.analysis import comparison as comparison
from cvfp.analysis import intervals as intervals
from cvfp.analysis import plots as plots
from cvfp.analysis import prediction as prediction
from cvfp.analysis import published as published
from cvfp.analysis import readings as readings
from cvfp.analysis import rules as rules
from cvfp.analysis import scaling as scaling
from cvfp.analysis import stopping as stopping
from cvfp.analysis import tables as tables
