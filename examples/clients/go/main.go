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
	url := os.Getenv("REDIS_URL")
	if url == "" {
		url = "redis://127.0.0.1:6379"
	}
	options, err := redis.ParseURL(url)
	if err != nil {
		panic(err)
	}
	client := redis.NewClient(options)
	for _, key := range os.Args[1:] {
		start := time.Now()
		value, err := client.Get(context.Background(), key).Result() // a miss is loaded by the sidecar
		if err != nil && err != redis.Nil {
			panic(err)
		}
		fmt.Printf("%s = %s (%.1f ms)\n", key, value, float64(time.Since(start).Microseconds())/1000)
	}
}
