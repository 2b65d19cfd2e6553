// Says that keys, or a tag, have changed, with plain go-redis: go run ./announce key user:42 tag faces
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/redis/go-redis/v9"
)

func main() {
	options, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		options = &redis.Options{Addr: "127.0.0.1:6379"}
	}
	client := redis.NewClient(options)
	words := os.Args[1:]
	for at := 0; at+1 < len(words); at += 2 {
		event := &redis.XAddArgs{Stream: "larder:events", Values: []string{words[at], words[at+1]}}
		id, err := client.XAdd(context.Background(), event).Result()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(id)
	}
}
