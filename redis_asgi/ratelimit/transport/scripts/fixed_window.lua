-- Fixed window, opened by a client's first request. Field: "start count" (us, units).
-- The stored start decides; the TTL only cleans up.
make.f = function()
  return {
    load = function(s, raw, now)
      local W = s.policy.window
      s.start, s.count, s.opened = now, 0, false
      if raw then
        local opened, count = parts(raw, '^(%d+) (%d+)$')
        local start = opened + 0
        if start > now then s.count, s.moved = count + 0, true
        elseif now < start + W then s.start, s.count, s.opened = start, count + 0, opened end
      end
      s.free = s.policy.quota - s.count
      s.receipt_now = s.start
    end,
    wait = function(s, cost, now) return s.start + s.policy.window - now end,
    charge = function(s, cost)
      s.count = min(s.count + cost, 10 * s.policy.quota)
      s.free = s.policy.quota - s.count
    end,
    refund = function(s, cost, receipt)
      if receipt ~= s.start then return false end
      s.count = max(0, s.count - cost)
      s.free = s.policy.quota - s.count
      return true
    end,
    reset = function(s, now)
      if s.count == 0 then return 0 end
      return s.start + s.policy.window - now
    end,
    save = function(s, now)
      -- The key got its TTL when the window opened.
      if s.opened then return s.opened .. ' ' .. s.count, 0 end
      return integer(s.start) .. ' ' .. s.count, s.start + s.policy.window - now
    end,
  }
end
