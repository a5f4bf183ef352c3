"""Long trials that pytest does not collect: damaged files by the thousand, processes killed at random moments."""
