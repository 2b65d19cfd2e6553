// Reads keys through a Larder sidecar with plain go-redis: go run . user:1 user:2
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/redis/go-redis/v9"
)

func main() {
	options, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		options = &redis.Options{Addr: "127.0.0.1:6379"}
	}
	client := redis.NewClient(options)
	for _, key := range os.Args[1:] {
		start := time.Now()
		value, _ := client.Get(context.Background(), key).Result() // a miss is loaded by the sidecar
		fmt.Printf("%s = %s (%v)\n", key, value, time.Since(start))
	}
}
