"""What tests share: small runs, launchers, data sets, servers, networks whose right answers are known."""
