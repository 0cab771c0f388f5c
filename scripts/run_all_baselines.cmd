@echo off
rem The same as python scripts\run_all_baselines.py, from any folder.
python "%~dp0run_all_baselines.py" %*
exit /b %errorlevel%
