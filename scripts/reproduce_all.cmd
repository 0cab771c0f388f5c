@echo off
rem The same as python scripts\reproduce_all.py, from any folder.
python "%~dp0reproduce_all.py" %*
exit /b %errorlevel%
