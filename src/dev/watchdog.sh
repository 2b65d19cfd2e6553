# Reads "guard GROUP" and "forget GROUP" until its input ends, which the system sees to when the writer is gone, however it went.
# Then ends every process group that is still guarded, and removes the directory $1 where one is given.
trap '' HUP INT TERM
groups=
while read -r verb group; do
  rest=
  for other in $groups; do
    [ "$other" = "$group" ] || rest="$rest $other"
  done
  groups=$rest
  [ "$verb" = guard ] && groups="$groups $group"
done
for group in $groups; do kill -s TERM -- "-$group"; done
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
  alive=
  for group in $groups; do kill -s 0 -- "-$group" && alive=1; done
  [ -z "$alive" ] && break
  sleep 0.1
done
for group in $groups; do kill -s KILL -- "-$group"; done
[ -n "$1" ] && rm -rf -- "$1"
exit 0
