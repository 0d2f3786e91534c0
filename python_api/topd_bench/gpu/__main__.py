import sys

from topd_bench.gpu.command import main

sys.exit(main())
