"""The page of ``editlab view``: a folder of runs in a browser, while they go and afterwards."""
