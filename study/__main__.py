from study.rows import main

main()
