// Cache-aside of go-redis with a pool of connections: go run ./cacheaside PORT. Says `ok` at the end.
package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const callers = 50

var (
	ctx   = context.Background()
	loads int64
)

func check(holds bool, format string, values ...interface{}) {
	if !holds {
		panic(fmt.Sprintf(format, values...))
	}
}

// user is a row, from the cache or from a database that takes its time.
func user(client *redis.Client, id int, load time.Duration) string {
	key := fmt.Sprintf("user:%d", id)
	found, err := client.Get(ctx, key).Result()
	if err == nil {
		return found
	}
	check(err == redis.Nil, "GET: %v", err)
	atomic.AddInt64(&loads, 1)
	time.Sleep(load)
	row := fmt.Sprintf("row %d", id)
	check(client.Set(ctx, key, row, 0).Err() == nil, "SET failed")
	return row
}

func main() {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + os.Args[1], PoolSize: callers})
	// Of all who ask, one loads, whichever connection its SET goes by.
	var group sync.WaitGroup
	for number := 0; number < callers; number++ {
		group.Add(1)
		go func() {
			defer group.Done()
			row := user(client, 1, 300*time.Millisecond)
			check(row == "row 1", "%s", row)
		}()
	}
	group.Wait()
	check(loads == 1, "%d loads", loads)
	ttl := client.TTL(ctx, "user:1").Val()
	check(ttl > 0, "TTL %v", ttl)
	// A deletion while a load runs: its late value is not stored.
	group.Add(1)
	go func() {
		defer group.Done()
		user(client, 2, 500*time.Millisecond)
	}()
	time.Sleep(150 * time.Millisecond)
	client.Del(ctx, "user:2")
	group.Wait()
	err := client.Get(ctx, "user:2").Err()
	check(err == redis.Nil, "a late value was stored: %v", err)
	fmt.Println("ok")
}
