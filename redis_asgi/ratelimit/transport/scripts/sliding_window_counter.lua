-- Sliding window counter: two aligned buckets, the older one fading. Field: "since current previous" (when the older of those
-- that are not 0 began to be counted in us, units, units): a receipt of before that is of a counter that was forgotten since.
-- No floor() on the faded bucket: flooring it admits up to one unit too many.
make.s = function()
  local function weigh(s)
    local W = s.policy.window
    s.free = floor(s.policy.quota + s.policy.edge - (s.previous * (W - s.elapsed) / W + s.current))
  end

  return {
    load = function(s, raw, now)
      local W = s.policy.window
      local index = floor(now / W)
      s.since, s.current, s.previous = now, 0, 0
      if raw then
        local since, current, previous = parts(raw, '^(%d+) (%d+) (%d+)$')
        since, current, previous = since + 0, current + 0, previous + 0
        local older = index - floor(since / W) - (previous > 0 and 1 or 0)
        if older == 0 then s.since, s.current, s.previous = min(since, now), current, previous
        -- How far the older one had faded is not known: both in full, so that a step reopens nothing.
        elseif older < 0 then s.current, s.moved = current + previous, true
        elseif older == 1 then s.since, s.previous = since, current end
      end
      s.index, s.elapsed = index, now - index * W
      s.receipt_now = now
      weigh(s)
    end,
    wait = function(s, cost, now)
      local W, L = s.policy.window, s.policy.quota
      local wait = W - s.elapsed
      if s.current + cost <= L then wait = wait - W * (L - s.current - cost) / s.previous
      else wait = wait + max(0, W * (1 - (L - cost) / s.current)) end
      return ceil(wait)
    end,
    charge = function(s, cost)
      s.current = min(s.current + cost, 10 * s.policy.quota)
      weigh(s)
    end,
    refund = function(s, cost, receipt)
      local older = s.index - floor(receipt / s.policy.window)
      if receipt < s.since then return false
      elseif older == 0 then s.current = max(0, s.current - cost)
      elseif older == 1 then s.previous = max(0, s.previous - cost)
      else return false end
      weigh(s)
      return true
    end,
    reset = function(s, now)
      local left = s.policy.window - s.elapsed
      if s.current > 0 then return left + s.policy.window end
      if s.previous > 0 then return left end
      return 0
    end,
    save = function(s, now)
      local first = s.index - (s.previous > 0 and 1 or 0)
      return integer(max(s.since, first * s.policy.window)) .. ' ' .. s.current .. ' ' .. s.previous,
        2 * s.policy.window - s.elapsed
    end,
  }
end
